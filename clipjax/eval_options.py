"""The commands of `clipjax eval` and their options, as data. eval_commands.py holds what they do."""

from typing import get_args

from clipjax import config, eval_commands
from clipjax.arguments import local_folder, names, nonnegative, positive, writable_file, writable_folder
from clipjax.config.tasks import ProbeMethod
from clipjax.declared import DATA, DATASET, RUN, VECTORS, argument, command, json_out
from clipjax.eval_commands import evaluating

METHODS = get_args(ProbeMethod)
LEARNED = (
    argument("--train", "SPLIT", "the split that is learned from, or a share of one, as train#0-80", default="train"),
    argument("--label-pattern", "REGEX", "the class is what this finds in the main caption; else it is the label"),
)

PROMPTS = (
    argument(
        "--classnames",
        "NAME|FILE",
        "a test set's names (imagenet1k, imagenet-a, eurosat, ...), or one name a line, in the order of the labels; "
        "else the dataset's own, with words for wnids",
    ),
    argument(
        "--templates",
        "NAME|FILE",
        "simple (7 prompts a class), imagenet (80), plain (the name alone), a test set's (cifar10, eurosat, ...), or a file "
        "with one {c} a line; else the dataset's own (CLIP_benchmark's layout), or simple",
    ),
)

EVAL_COMMANDS = (
    command(
        "eval zeroshot",
        evaluating(config.Zeroshot),
        "zero-shot classification: acc1, acc5, mean-per-class recall",
        *DATA,
        VECTORS,
        *PROMPTS,
        argument(
            "--predictions", "FILE", "also write a csv of the five nearest classes of each image, with cosines", writable_file
        ),
        json_out("the result"),
    ),
    command(
        "eval retrieval",
        evaluating(config.Retrieval),
        "image-text retrieval: recall at 1, 5 and 10 in both directions",
        *DATA,
        VECTORS,
        argument("--languages", "NAMES", "of each image's captions in order, as en,ja: each gets recalls of its own", names),
        json_out("the result"),
    ),
    command(
        "eval geometry",
        evaluating(config.Geometry),
        "the contrastive gap: distances, separability, uniformity, alignment, RankMe",
        *DATA,
        json_out("the result, with curves of explained variance,"),
        argument(
            "--png",
            "OUT",
            "plot of the embeddings and their spectra; else beside --json, or geometry-SPEC-SPLIT.png in this folder",
            writable_file,
        ),
    ),
    command(
        "eval captioning",
        evaluating(config.Captioning),
        "greedy captions against those of the dataset: exact match, perplexity, BLEU, chrF, CIDEr",
        *DATA,
        json_out("the result"),
        argument(
            "--png",
            "OUT",
            "some images with their captions; else beside --json, or captioning-SPEC-SPLIT.png in this folder",
            writable_file,
        ),
        argument("--samples", "N", "number of images in --png", positive, default=32),
    ),
    command(
        "eval probe",
        evaluating(config.Probe),
        "classifiers learned from image vectors: a linear probe, nearest neighbours, ridge from few examples",
        *DATA,
        *LEARNED,
        argument("--methods", None, "which classifiers; else all", nargs="+", choices=METHODS),
        VECTORS,
        json_out("the result, with the accuracy of each C,"),
    ),
    command(
        "eval transfer",
        evaluating(config.Transfer),
        "classifiers learned from captions' vectors with noise, tested on images",
        *DATA,
        *LEARNED,
        argument("--noise", "X", "the length of the noise that is added to captions' unit vectors", nonnegative, default=1.0),
        json_out("the result, with the accuracy at other lengths of noise,"),
    ),
    command(
        "eval calibration",
        evaluating(config.Calibration),
        "zero-shot probabilities: expected calibration error, before and after one temperature is fitted",
        *DATA,
        *PROMPTS,
        json_out("the result"),
    ),
    command(
        "eval choice",
        evaluating(config.Choice),
        "which caption is whose picture's: Winoground, SugarCrepe, ARO, WinoGAViL, or captions against disrupted copies",
        *DATA,
        argument(
            "--questions",
            "FILE",
            "questions on pictures of --data: Winoground's examples.jsonl, a JSON of the others, or your own; else the "
            "dataset's main captions against copies with shuffled and replaced words",
        ),
        json_out("the result"),
    ),
    command(
        "eval composed",
        evaluating(config.Composed),
        "retrieval of pictures by a picture and a text that says what changes: SIMAT, GeneCIS, emoji's skin tones",
        *DATA,
        argument("--questions", "FILE", "questions on pictures of --data, as JSON; needed unless --data is emoji"),
        argument("--weight", "X", "of the text's vector, which is added to the picture's", nonnegative, default=0.5),
        json_out("the result, with the recalls at other weights,"),
    ),
    command(
        "eval robustness",
        eval_commands.eval_robustness,
        "effective robustness: accuracies under shifts beside those of reference models that are as accurate without",
        argument("results", "RUN", "a workdir that `clipjax eval suite` has evaluated, or a folder of its results"),
        argument("--reference", "FILE.csv", "a row a model: its name, and its accuracy under each set's name", required=True),
        argument("--on", "NAME", "the set without the shift, as imagenet1k", required=True),
        json_out("all figures"),
    ),
    command(
        "eval instance",
        evaluating(config.Instance),
        "images of the same class found by an image: recall at 1, 5 and 10, mean average precision",
        *DATA,
        argument("--gallery", "SPEC", "the images that are searched; else the other images of --data"),
        argument("--gallery-split", "SPLIT", "split of --gallery; else as --split"),
        json_out("the result"),
    ),
    command(
        "eval suite",
        eval_commands.eval_suite,
        "all sets of a suite, each with its main figure, and means over them",
        *RUN,
        argument("suite", "SUITE", "quick, datacomp, clip_benchmark or emoji, or a SUITE.py of your own"),
        argument("--root", "DIR", "the folder of the suite's sets, local or in a bucket; else where the suite says"),
        argument("--out", "DIR", "where results go; else RUN/suites/SUITE", writable_folder),
        (
            argument("--cache", "DIR", "where embeddings are kept on this machine; else RUN/embeddings", local_folder),
            argument("--no-cache", None, "embeddings are not kept", action="store_true"),
        ),
        argument("--cache-bytes", "N", "how much may be kept, else 20 GB; what was used longest ago is dropped", positive),
    ),
    command(
        "eval relative",
        eval_commands.eval_relative,
        "two runs' spaces by relative representations: how alike they are; texts of B found by images of A, and the reverse",
        argument("a", "A", "a workdir of `clipjax train`, or RUN@STEP"),
        argument("b", "B", "another one"),
        RUN[1],
        *DATASET,
        argument("--anchors", "SPLIT", "split of the dataset whose pairs describe the others, 1,024 at most", default="train"),
        json_out("the result"),
    ),
    command(
        "eval compare",
        eval_commands.eval_compare,
        "a run against another on the same queries: paired bootstrap intervals; status 1 where B is worse than A",
        argument("a", "A", "a workdir that `clipjax eval suite` has evaluated, or a folder of its results"),
        argument("b", "B", "another one"),
        argument("--metric", "NAME", "compare this metric on every set that has it; else each set's main one"),
        argument("--margin", "X", "how much worse B may be", nonnegative, default=0.0),
        json_out("all figures"),
    ),
)
