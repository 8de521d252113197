"""Six sets of CLIP_benchmark in minutes: CIFAR-10 and -100, DTD, EuroSAT, Pets and Flickr8k."""

from clipjax.config import Retrieval, Suite, SuiteMean, SuiteSet, Zeroshot

CLASSIFICATION = {
    "cifar10": "acc1",
    "cifar100": "acc1",
    "dtd": "acc1",
    "eurosat": "acc1",
    "pets": "mean_per_class_recall",
}


def suite() -> Suite:
    sets = [
        SuiteSet(
            name=name,
            evaluation=Zeroshot(data=f"wds:{{root}}/wds_vtab-{name}"),
            main=(metric,),
            protocol="names and templates that come with the set",
        )
        for name, metric in CLASSIFICATION.items()
    ]
    flickr = SuiteSet(
        name="flickr8k",
        evaluation=Retrieval(data="wds:{root}/wds_flickr8k"),
        main=("image_retrieval_recall@1", "text_retrieval_recall@1"),
        main_name="mean_recall@1",
        protocol="half of both directions",
    )
    mean = SuiteMean(name="mean", of=(*CLASSIFICATION, "flickr8k"), protocol="clipjax's own: a mean over unlike figures")
    return Suite(root="hf://datasets/clip-benchmark", sets=(*sets, flickr), means=(mean,))
