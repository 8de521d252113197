"""The commands of the command line and their options, as data. cli.py makes a parser of them, commands.py holds what they do."""

from clipjax import commands, data_commands, weight_commands
from clipjax.arguments import local, local_folder, place, positive, step_range, writable_file, writable_folder
from clipjax.bench import BATCHES, CPU_DEVICES, LOSSES
from clipjax.declared import DATA, FIELDS, RUN, SPEC, VECTORS, argument, command, json_out
from clipjax.eval_options import EVAL_COMMANDS

ORIGINS = ("open_clip", "transformers", "big_vision")
GROUPS = {
    "eval": "evaluate a run",
    "data": "prepare a dataset, or look at one",
    "bench": "measure time, memory and throughput",
}
COMMANDS = (
    command(
        "train",
        commands.train,
        "train a model, or resume it from the newest checkpoint of its workdir",
        argument("--workdir", "RUN", "folder of the run, local or on gs:// or s3://", writable_folder),
        argument(
            "--profile",
            "FROM:TO",
            "trace the steps from FROM finished ones to TO, on all processes, into RUN/profile, for TensorBoard or Perfetto",
            step_range,
        ),
        argument(
            "--accept-new-data", None, "resume also with other data than before (other keys or captions)", action="store_true"
        ),
        fields=True,
    ),
    command(
        "configs",
        commands.configs,
        "list the configs that come with clipjax, or print one to start from",
        argument("name", "NAME", "print this one", nargs="?"),
    ),
    command(
        "plan",
        commands.plan,
        "compile a run's train step for devices that need not be present: memory, sharding, collectives, FLOPs, estimated time",
        argument(
            "--topology",
            "T",
            "TPUs, as v5e:16x16; GPUs, as h100:8, or h100:2x8 on 2 hosts; cpu:N, simulated; else this machine's devices",
        ),
        argument("--slices", "N", "number of such slices, joined by the data-centre network", positive, default=1),
        argument(
            "--find-batch",
            None,
            "also find the largest batch that fits, a power of two, with the configured train.micro_batches",
            action="store_true",
        ),
        json_out("all figures"),
        fields=True,
    ),
    *EVAL_COMMANDS,
    command(
        "embed",
        commands.embed,
        "write a dataset's embeddings: arrays image, text (where there are captions) and key; float32 unit vectors",
        *DATA,
        VECTORS,
        argument("--out", "FILE.npz", "file to write", writable_file, required=True),
    ),
    command(
        "cluster",
        commands.cluster,
        "cluster embeddings by k-means, and write each example's nearest clusters: labels for data.labels",
        argument("embeddings", "EMB.npz", "a file of `clipjax embed`", local),
        argument("--classes", "C", "number of clusters", positive, required=True),
        argument("--nearest", "L", "labels of an example: its L nearest clusters, the nearest first", positive, default=1),
        argument("--side", None, "both: by the mean of both cosines", choices=("image", "text", "both"), default="image"),
        argument("--seed", "N", "seed of the start", int, default=0),
        argument("--out", "LABELS.npz", "file to write: arrays key, label and centroid", writable_file, required=True),
    ),
    command(
        "caption",
        commands.caption,
        "generate captions of images: greedily, by beam search (--beams), or by sampling (--temperature, --top-k, --top-p)",
        *RUN,
        argument("images", "IMAGE", "image files, and SPECs of datasets: all images of each", nargs="+"),
        argument("--split", None, "split of the datasets", default="test"),
        FIELDS[0],
        json_out("image, caption and logprob (nats) of each"),
        argument("--beams", "N", "beam search: keep the N best captions at each token", positive),
        argument("--alpha", "A", "beam search: rank by log-probability / tokens ** A (default: 1)", float),
        argument("--temperature", "T", "sample each token from softmax(logits / T), T > 0 (default: 1)", float),
        argument("--top-k", "K", "sample among the K likeliest tokens (default: all)", positive),
        argument("--top-p", "P", "sample among the likeliest tokens whose probabilities add up to P (default: 1)", float),
        argument("--seed", "N", "seed of the sampling (default: 0)", int),
    ),
    command(
        "report",
        commands.report,
        "put runs side by side on one page that opens offline: figures with intervals, curves, galleries, configurations",
        argument("folders", "DIR", "workdirs; the others are compared with the first", nargs="+"),
        argument("--out", "FILE.html", "file to write", writable_file, required=True),
        argument("--data", "SPEC", "dataset of the galleries; else those that the first run evaluates on during training"),
        argument("--split", None, "split of --data", default="test"),
        argument("--reference", "FILE", "figures of published models: a csv or parquet file as LAION's tables of scaling laws"),
        argument("--no-pictures", None, "load no run: no galleries and no geometry", action="store_false", dest="pictures"),
        RUN[1],
    ),
    command(
        "export",
        weight_commands.export,
        "write a folder that open_clip or transformers loads as it is",
        *RUN,
        argument("--to", None, "the library that will load it", required=True, choices=("open_clip", "transformers")),
        argument("--out", "DIR", "a new folder, or that of an earlier export", local_folder, required=True),
        argument(
            "--dtype", None, "of the weights (default: float32)", choices=("float32", "bfloat16", "float16"), default="float32"
        ),
        argument("--verify", None, "load it in PyTorch and compare embeddings of the run's own examples", action="store_true"),
        argument("--examples", None, "number of examples that --verify compares", positive, default=32),
    ),
    command(
        "import",
        weight_commands.import_run,
        "make a workdir from another library's model, to evaluate, embed, caption or export it",
        argument(
            "source", "SRC", "a folder of open_clip's or transformers', a model of the hub, or an .npz of big_vision's", local
        ),
        argument("--from", None, "the library that wrote it", dest="origin", required=True, choices=ORIGINS),
        argument("--out", "RUN", "a new workdir, local or on gs:// or s3://", writable_folder, required=True),
        argument("--tokenizer", "FILE", "a tokenizer.json or SentencePiece model; else that of SRC", local),
        argument("--image-size", "N", "side of the images in pixels, where SRC leaves it open", positive),
        argument("--verify", None, "load SRC in PyTorch by its own library and compare embeddings", action="store_true"),
    ),
    command(
        "average",
        weight_commands.average,
        "make a workdir with a weighted mean of runs' weights (WiSE-FT, soups), to evaluate, embed, export or start from it",
        argument("runs", "RUN", "a workdir, local or on gs:// or s3://: its newest checkpoint, or RUN@STEP", nargs="+"),
        (
            argument("--alpha", "X", "of two runs: (1 - X) times the first and X times the second, any number", float),
            argument("--weights", "W", "each run's weight; they sum to 1. Default: all are equal", float, nargs="+"),
        ),
        RUN[1],
        argument("--out", "RUN", "a new workdir, local or on gs:// or s3://", writable_folder, required=True),
    ),
    command(
        "data prepare",
        data_commands.data_prepare,
        "build a dataset: emoji in the folder of TFDS, local or on gs:// or s3://, or openclipart in --out",
        argument(
            "name",
            None,
            "emoji: from the system's colour-emoji font; openclipart: 5,409 drawings from two packages of Debian, 156 MB",
            choices=("emoji", "openclipart"),
        ),
        argument("--out", "DIR", "a new folder for openclipart; else openclipart in this folder", local_folder),
        argument(
            "--style",
            None,
            "of emoji: as Twitter draws them, to test on (tfds:emoji_twitter); from a package of npm's, 62 MB; else the font's",
            choices=("twitter",),
        ),
    ),
    command(
        "data index",
        data_commands.data_index,
        "make the index of tars, once: counts, and where each sample is; several hosts with the same --out share the work",
        argument("spec", "SPEC", "wds:SHARDS: tars, folders, or names with braces or wildcards; several joined by ::"),
        argument("--out", "DIR", "folder of the index; else beside the shards, or in the user's cache", writable_folder),
    ),
    command(
        "data inspect",
        data_commands.data_inspect,
        "count, image sizes, captions, truncation, and a contact sheet",
        argument("spec", "SPEC", SPEC),
        argument("--split", None, "split of the dataset, or a share of it, as train#0-95", default="train"),
        *FIELDS,
        argument("--tokenizer", "FILE", "a tokenizer.json; else a BPE is trained on the captions", place),
        argument("--length", None, "tokens a caption may have, for the truncation statistics", positive, default=77),
        argument("--png", "OUT", "the contact sheet; else SPEC-SPLIT.png in this folder", writable_file),
        json_out("the statistics"),
    ),
    command(
        "bench loss",
        commands.bench_loss,
        "the streamed losses beside dense ones: memory, FLOPs, collectives and time",
        argument("--loss", None, "losses to measure", nargs="+", choices=LOSSES, default=LOSSES),
        argument("--batch", "N", "global batch sizes, in pairs", positive, nargs="+", default=BATCHES),
        argument("--width", None, "width of the embeddings", positive, default=512),
        argument(
            "--travel",
            None,
            "how columns reach the other devices; auto: by size",
            choices=("ring", "gather", "auto"),
            default="auto",
        ),
        (
            argument("--devices", "N", f"use N devices; else all, or {CPU_DEVICES} simulated on a CPU", positive),
            argument("--topology", "T", "compile for chips that need not be present, as v5e:16x16 or h100:8; measures no time"),
        ),
        argument("--turns", None, "timed runs of each form, in alternation", positive, default=7),
        argument("--patience", "SECONDS", "a batch whose turns take longer is not timed", positive, default=15),
        json_out("all figures"),
    ),
    command(
        "bench step",
        commands.bench_step,
        "a run's train step on this machine's devices: seconds, images/s, memory, MFU; on random input, so it needs no data",
        argument("--turns", "N", "timed turns, each of at least a second", positive, default=7),
        json_out("all figures"),
        fields=True,
    ),
    command(
        "bench input",
        commands.bench_input,
        "how fast this machine reads, decodes and tokenises a run's batches",
        argument("--seconds", "N", "how long to read", positive, default=20),
        json_out("all figures"),
        fields=True,
    ),
)
