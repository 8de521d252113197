"""DataComp's 38 sets, their main metrics and means, as its tasklist.yml and aggregate_scores.py have them (2304.14108)."""

from clipjax.config import Choice, Retrieval, Suite, SuiteMean, SuiteSet, TrainingEvaluation, Zeroshot

SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
ACC1 = (
    *("cifar10", "country211", "food101", "gtsrb", "imagenet1k", "mnist", "renderedsst2", "cars", "stl10", "sun397", "voc2007"),
    *SHIFTS,
    *("vtab/cifar100", "vtab/clevr_count_all", "vtab/clevr_closest_object_distance", "vtab/dtd", "vtab/eurosat", "vtab/pcam"),
    *("vtab/kitti_closest_vehicle_distance", "vtab/resisc45", "vtab/svhn"),
    "wilds/camelyon17",
)
RECALL = ("vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets")
GROUPED = {  # set -> metric, what it is called there, and what is to be known
    "wilds/iwildcam": ("macro_f1", "F1-macro_all", "over the classes that occur, as WILDS's all_metrics.py"),
    "wilds/fmow": ("acc_wg", "acc_worst_region", "worst region with images; DataComp's evaluator doesn't know which is Other"),
    "fairness/dollar_street": ("acc_top5_wg", "acc_top5_wg", "the worst income group, at 5"),
    "fairness/geode": ("acc_wg", "acc_wg", "the worst region"),
}
RECALLS = ("image_retrieval_recall@1", "text_retrieval_recall@1")
FLICKR = "all 31,014 images, as tasklist.yml says; not Karpathy's 1,000; as parquet of the hub's nlphuji/flickr30k"
COCO = "as parquet of the hub's nlphuji/mscoco_2014_5k_test_image_text_retrieval"
WINOGAVIL = "cues of 10 to 12 candidates, as wino_eval.py; a folder of its pictures and winogavil.jsonl, as docs/composition says"

VTAB = (*(n for n in (*ACC1, *RECALL) if n.startswith("vtab/")), "sun397")


def short(name: str) -> str:
    return name.rpartition("/")[2]


def classified(name: str, metric: str, called: str, more: str = "") -> SuiteSet:
    zeroshot = Zeroshot(data=f"wds:{{root}}/wds_{name.replace('/', '-')}_test")
    protocol = "names and templates that come with the set" + (f"; {more}" if more else "")
    return SuiteSet(name=short(name), evaluation=zeroshot, main=(metric,), main_name=called, protocol=protocol)


def suite() -> Suite:
    def retrieved(name: str, evaluation: TrainingEvaluation, more: str) -> SuiteSet:
        return SuiteSet(name=name, evaluation=evaluation, main=RECALLS, main_name="mean_recall@1", protocol=more)

    sets = (
        *(classified(name, "acc1", "acc1") for name in ACC1),
        *(classified(name, "mean_per_class_recall", "mean_per_class_recall") for name in RECALL),
        *(classified(name, *facts) for name, facts in GROUPED.items()),
        retrieved("flickr", Retrieval(data="parquet:{root}/flickr30k"), FLICKR),
        retrieved("mscoco", Retrieval(data="parquet:{root}/mscoco_2014_5k_test_image_text_retrieval"), COCO),
        SuiteSet(
            name="winogavil",
            evaluation=Choice(data="folder:{root}/winogavil", questions="{root}/winogavil.jsonl"),
            main=("jaccard_10-12",),
            main_name="jaccard_score_10-12",
            protocol=WINOGAVIL,
        ),
    )
    source = "aggregate_scores.py"
    means = (
        SuiteMean(name="average", of=tuple(one.name for one in sets), protocol=f"{source}: the plain mean of all 38"),
        SuiteMean(name="imagenet_shifts", of=SHIFTS, protocol=f"{source}: ImageNet dist. shifts"),
        SuiteMean(name="vtab", of=tuple(map(short, VTAB)), protocol=f"{source}: VTAB, 13 sets"),
        SuiteMean(name="retrieval", of=("flickr", "mscoco", "winogavil"), protocol=f"{source}: Retrieval"),
    )
    return Suite(root="hf://datasets/djghosh", sets=sets, means=means)
