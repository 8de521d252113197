"""CLIP_benchmark's 40 sets on the Hugging Face hub: VTAB+, ImageNet's shifts and retrieval, as its webdatasets.txt lists them."""

from clipjax.config import Retrieval, Suite, SuiteMean, SuiteSet, Zeroshot

ROBUSTNESS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
OWN_SPLITS = ("fer2013", "voc2007", "cars", "fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211", "renderedsst2")
VTAB = (
    *("caltech101", "cifar100", "clevr_count_all", "clevr_closest_object_distance", "diabetic_retinopathy", "dmlab"),
    *("dsprites_label_orientation", "dsprites_label_x_position", "dtd", "eurosat", "kitti_closest_vehicle_distance"),
    *("flowers", "pets", "pcam", "resisc45", "smallnorb_label_azimuth", "smallnorb_label_elevation", "svhn"),
)  # and sun397, which isn't VTAB's own copy
VTAB_PLUS = ("imagenet1k", *ROBUSTNESS, *OWN_SPLITS, "sun397", "cifar10", *VTAB)
MORE = ("imagenet-o", "dsprites_label_y_position")  # are in no collection
RETRIEVAL = ("mscoco_captions", "flickr8k", "flickr30k")

SOURCE = "CLIP_benchmark's webdatasets.txt"
COLLECTION = "CLIP_benchmark's dataset_collection, which has no means: plain means of acc1, as in LAION-5B's table (2210.08402)"


def folder(name: str) -> str:
    vtab = name in (*VTAB, "cifar10", "dsprites_label_y_position")
    return f"wds:{{root}}/wds_{'vtab-' * vtab}{name}"


def suite() -> Suite:
    classification = [
        SuiteSet(
            name=name,
            evaluation=Zeroshot(data=folder(name)),
            main=("acc1",),
            protocol=f"{SOURCE}; names and templates that come with the set; float32, where its default is amp",
        )
        for name in (*VTAB_PLUS, *MORE)
    ]
    retrieval = [
        SuiteSet(
            name=name,
            evaluation=Retrieval(data=folder(name)),
            main=("image_retrieval_recall@5",),
            protocol=f"{SOURCE}; the figure of its notebook",
        )
        for name in RETRIEVAL
    ]
    means = (
        SuiteMean(name="vtab+", of=VTAB_PLUS, protocol=f"{COLLECTION}; without voc2007_multilabel, which is not on the hub"),
        SuiteMean(name="vtab", of=(*VTAB, "sun397"), protocol=COLLECTION),
        SuiteMean(name="imagenet_robustness", of=ROBUSTNESS, protocol=COLLECTION),
        SuiteMean(name="retrieval", of=RETRIEVAL, protocol="of image_retrieval_recall@5"),
    )
    return Suite(root="hf://datasets/clip-benchmark", sets=(*classification, *retrieval), means=means)
