import dataclasses
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from clipjax import config
from clipjax.config import Augment, ConfigError, Data
from clipjax.data.captions import caption_id
from clipjax.data.images.image import decode, fit
from clipjax.data.pipeline import eval_batches, eval_captions, train_batches
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.status import CertainFailure
from tests.data.conftest import IMAGES, write_tsv

AUGMENT = Augment(crop=0.5, flip=True, brightness=0.2)
SIZE = 16


@pytest.fixture
def data(images_tsv):
    return Data(spec=f"tsv:{images_tsv}", augment=AUGMENT, workers=2)


@pytest.fixture
def batches(data, tokenizer):
    """The first n training batches under the given settings."""

    def make(n, *, batch_size=8, seed=0, source=None, text=tokenizer, **where):
        fields = {k: where.pop(k) for k in vars(data).keys() & where.keys()}
        chosen = dataclasses.replace(data, **fields)
        source = source or open_source(data)
        with train_batches(source, text, chosen, image_size=SIZE, batch_size=batch_size, seed=seed, **where) as iterator:
            return list(itertools.islice(iterator, n))

    return make


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def numbers(batch, tokenizer):
    return [int(tokenizer.decode(row).split()[1]) for row in batch["text"]]


@pytest.fixture
def several(images_tsv, tmp_path):
    """Twelve images: number i has five captions, `number i` first, then `number i + 20`, ...; 3 and 4 share the first but for
    case and punctuation."""
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes())
    rows = [(f"{i}.png", f"number {i + 20 * n}") for n in range(5) for i in range(12)]
    rows[4] = ("4.png", "Number: 3!")
    return open_source(Data(spec=f"tsv:{write_tsv(tmp_path, rows)}"))


def test_shapes_and_types(batches, tokenizer):
    (batch,) = batches(1)
    shapes = {name: (x.shape, x.dtype.name) for name, x in batch.items()}
    assert shapes == {
        "image": ((8, SIZE, SIZE, 3), "uint8"),
        "text": ((8, tokenizer.length), "int32"),
        "index": ((8,), "int32"),
        "truncated": ((8,), "bool"),
        "fault": ((8,), "int8"),
        "fault_index": ((8,), "int32"),
        "replaced": ((8,), "bool"),
        "filtered": ((8,), "bool"),
    }
    assert not batch["replaced"].any()
    assert not batch["truncated"].any()


def test_image_and_caption_belong_together(batches, tokenizer, data):
    """Red is 4 times the number in the caption, up to the brightness factor."""
    for batch in batches(12):
        red = batch["image"][..., 0].astype(float).mean((1, 2))
        expected = 4.0 * np.array(numbers(batch, tokenizer))
        assert (np.abs(red - expected) <= 0.2 * expected + 1).all()


def test_order_and_augmentation_are_functions_of_the_seed(batches):
    first = batches(12)
    assert_same(batches(12), first)
    other = batches(12, seed=1)
    assert not all(np.array_equal(a["text"], b["text"]) for a, b in zip(first, other, strict=True))


def test_epochs(batches, tokenizer):
    """41 images, batches of 8: five full batches an epoch without a repetition, each epoch in another order and with
    other augmentations."""
    seen = [numbers(batch, tokenizer) for batch in batches(20)]
    epochs = [list(itertools.chain(*seen[i : i + 5])) for i in range(0, 20, 5)]
    for epoch in epochs:
        assert len(set(epoch)) == 40
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set(itertools.chain(*epochs)) == set(range(IMAGES))  # what one epoch leaves out, another has


def test_each_visit_is_augmented_differently(batches, tokenizer):
    images = {}
    for batch in batches(20):
        for number, image in zip(numbers(batch, tokenizer), batch["image"], strict=True):
            images.setdefault(number, []).append(image.tobytes())
    assert all(len(set(seen)) == len(seen) for seen in images.values())


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_threads_do_not_change_the_stream(batches, workers):
    assert_same(batches(12, workers=workers), batches(12))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_give_the_stream_of_threads(batches, workers):
    """Also from a step in the middle, and over the end of an epoch."""
    straight = batches(9)
    assert_same(batches(7, worker_kind="processes", workers=workers, start_step=2), straight[2:])


@pytest.mark.parametrize("start", [1, 5, 13])
def test_resume(batches, start):
    assert_same(batches(16 - start, start_step=start), batches(16)[start:])


SKIPS = [((0, 3),), ((2, 3), (3, 4), (9, 12)), ((11, 13),), ((4, 5), (15, 99))]


@pytest.mark.parametrize("skip", SKIPS)
def test_batches_that_are_left_out(batches, skip):
    """Over the end of an epoch too: the others come in their order, each with its own augmentation."""
    straight = batches(110)
    kept = [n for n in range(110) if not any(a <= n < b for a, b in skip)]
    train = config.Train(skip=skip)
    assert [train.place(step) for step in range(len(kept))] == kept
    assert_same(batches(11, skip=skip), [straight[n] for n in kept[:11]])
    for start in (1, 4, 9):
        assert_same(batches(3, skip=skip, start_step=start), [straight[n] for n in kept[start : start + 3]])
    shares = [batches(6, skip=skip, process_index=p, process_count=2) for p in range(2)]
    joined = [{name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*shares, strict=True)]
    assert_same(joined, [straight[n] for n in kept[:6]])


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations([(), *SKIPS, ((2, 4), (9, 12)), ((2, 4),), ((5, 6),)], 2)])
def test_the_first_step_that_gets_another_batch(one, other):
    one, other = config.Train(skip=one), config.Train(skip=other)
    differ = [step for step in range(100) if one.place(step) != other.place(step)]
    assert one.first_other_batch(other) == other.first_other_batch(one) == (differ[0] if differ else None)


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_every_global_batch(batches, count):
    """Examples, order and augmentation: the shares side by side are the batch of a single host."""
    shares = [batches(12, process_index=p, process_count=count, start_step=1) for p in range(count)]
    joined = [{name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*shares, strict=True)]
    assert_same(joined, batches(13)[1:])


def test_one_of_several_captions_at_a_visit(batches, tokenizer, images_tsv):
    rows = [(f"{i}.png", f"number {n}") for i in range(4) for n in (i, i + 10, i + 20)]
    folder = images_tsv.parent / "several"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes())
    source = open_source(Data(spec=f"tsv:{write_tsv(folder, rows)}"))
    seen = [n for batch in batches(40, batch_size=4, source=source) for n in numbers(batch, tokenizer)]
    assert set(seen) == {i + n for i in range(4) for n in (0, 10, 20)}
    assert 35 <= sum(n < 10 for n in seen) <= 75  # a third of 160


def test_index_is_the_examples(batches, tokenizer):
    for batch in batches(6):
        assert batch["index"].tolist() == numbers(batch, tokenizer)


def shown(batch, tokenizer):
    return [[int(tokenizer.decode(row).split()[-1].strip("!")) for row in rows] for rows in batch["text"]]


def test_several_captions_of_each_image(batches, tokenizer, several):
    seen = batches(40, batch_size=12, source=several, captions_per_image=3)
    assert {(b["text"].shape, b["text"].dtype.name) for b in seen} == {((12, 3, tokenizer.length), "int32")}
    assert {(b["truncated"].shape, b["truncated"].dtype.name) for b in seen} == {((12, 3), "bool")}
    others = np.zeros(5, int)
    for batch in seen:
        for i, captions in zip(batch["index"], shown(batch, tokenizer), strict=True):
            assert captions[0] == (3 if i == 4 else i)
            rest = [(c - i) // 20 for c in captions[1:]]
            assert rest == sorted(set(rest))  # distinct
            others[rest] += 1
    assert others[0] == 0
    assert (np.abs(others[1:] - 240) < 55).all()  # each in 2 of 4 of 480 visits; 5 standard errors


@pytest.mark.parametrize("k", [2, 5])
def test_several_captions_on_any_workers_hosts_and_from_any_step(batches, several, k):
    chosen = dict(batch_size=4, source=several, captions_per_image=k, ids="caption")
    straight = batches(7, **chosen)
    assert_same(batches(7, workers=5, **chosen), straight)
    assert_same(batches(5, worker_kind="processes", start_step=2, **chosen), straight[2:])
    shares = [batches(7, process_index=p, process_count=2, **chosen) for p in range(2)]
    joined = [{name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*shares, strict=True)]
    assert_same(joined, straight)
    assert not np.array_equal(batches(1, seed=1, **chosen)[0]["text"], straight[0]["text"])


def test_fewer_captions_are_repeated_in_turn(batches, tokenizer, several, tmp_path):
    for batch in batches(2, batch_size=12, source=several, captions_per_image=5):
        five = shown(batch, tokenizer)
        for i, captions in zip(batch["index"], five, strict=True):
            assert captions[1:] == [i + 20 * n for n in range(1, 5)]
    rows = [("0.png", "number 0"), ("1.png", "number 1"), ("1.png", "number 2")]
    few = open_source(Data(spec=f"tsv:{write_tsv(tmp_path, rows)}"))
    (batch,) = batches(1, batch_size=2, source=few, captions_per_image=2)
    assert dict(zip(batch["index"].tolist(), shown(batch, tokenizer), strict=True)) == {0: [0, 0], 1: [1, 2]}
    refusal = r"^data.captions_per_image = 3: no example of tsv:.* has more than 2 captions \(2 were .*: .* data.text_field"
    with pytest.raises(ConfigError, match=refusal):
        batches(1, batch_size=2, source=few, captions_per_image=3)


def test_truncated_captions_are_counted_one_by_one(batches, several):
    short = Tokenizer.train(["number"], 265, lowercase=True, length=5)  # room for one digit
    (batch,) = batches(1, batch_size=12, source=several, captions_per_image=5, text=short)
    assert batch["truncated"][:, 1:].all()
    assert batch["truncated"][:, 0].sum() == 3  # 10, 11 and the one with two signs


def test_ids_of_main_captions(batches, several):
    assert "id" not in batches(1, source=several)[0]
    for k in (1, 3):
        seen = {}
        for batch in batches(6, batch_size=12, source=several, captions_per_image=k, ids="caption"):
            assert batch["id"].dtype == np.int32
            for i, number in zip(batch["index"].tolist(), batch["id"].tolist(), strict=True):
                assert seen.setdefault(i, number) == number == caption_id(several.record(i).captions[0])
        assert seen[3] == seen[4]
        assert len(set(seen.values())) == 11


def test_a_replacement_has_its_own_id(batches, images_tsv, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes() if i else b"torn")
    source = open_source(Data(spec=f"tsv:{write_tsv(tmp_path, [(f'{i}.png', f'number {i}') for i in range(4)])}"))
    (batch,) = batches(1, batch_size=4, source=source, ids="caption")
    ids = dict(zip(batch["index"].tolist(), batch["id"].tolist(), strict=True))
    assert ids[0] in {ids[1], ids[2], ids[3]}  # so that the pair is no negative of the one it repeats
    assert len(set(ids.values())) == 3


def test_emojis_languages(emoji_dataset):
    """With a tokenizer trained on all of them, each column of all fourteen is one language."""
    data = Data(spec="emoji", split="test", text_field="captions", captions_per_image=14, ids="caption", workers=2)
    source = open_source(data)
    tokenizer = Tokenizer.train(source.captions(), 4096, lowercase=False, length=48)
    with train_batches(source, tokenizer, data, image_size=SIZE, batch_size=64, seed=0) as stream:
        batch = next(stream)
    assert not batch["truncated"].any()
    assert len(set(batch["id"].tolist())) == 64
    for i, rows in zip(batch["index"].tolist(), batch["text"], strict=True):
        captions = source.record(i).captions
        assert len(captions) == 14
        np.testing.assert_array_equal(rows, tokenizer.encode(captions)[0])


def test_truncation_is_counted(batches, images_tsv):
    short = Tokenizer.train(["number"], 265, lowercase=True, length=5)  # room for ` number`, a space and one digit
    batch = batches(1, batch_size=40, text=short)[0]
    assert 30 <= batch["truncated"].sum() <= 31  # of all 41, 31 have two digits
    assert (batch["text"][:, -1] == short.end_id).all()


def test_unreadable_images_are_marked_as_replaced(batches, images_tsv, tokenizer, caplog):
    folder = images_tsv.parent / "damaged"
    folder.mkdir()
    for i in range(10):
        content = (images_tsv.parent / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(content if i != 6 else content[:300])
    source = open_source(Data(spec=f"tsv:{write_tsv(folder, [(f'{i}.png', f'number {i}') for i in range(10)])}"))
    seen = batches(3, batch_size=10, source=source)
    assert [int(b["replaced"].sum()) for b in seen] == [1, 1, 1]
    for batch in seen:
        assert 6 not in numbers(batch, tokenizer)
        assert sorted(np.array(numbers(batch, tokenizer))[~batch["replaced"]]) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
        assert sorted(batch["index"]) == list(range(10))  # that of the example, not of its stand-in: none comes twice
        assert batch["index"][batch["replaced"]] == [6]
    assert sum("6.png is replaced" in r.getMessage() for r in caplog.records) == 1


def test_nothing_readable_ends_the_run(batches, tmp_path):
    source = open_source(Data(spec=f"tsv:{write_tsv(tmp_path, [('a.png', 'number 1'), ('b.png', 'number 2')])}"))
    with pytest.raises(CertainFailure, match=r"can't be read: .* check the files"):
        batches(1, batch_size=2, source=source)


def test_dataset_smaller_than_the_batch(batches):
    with pytest.raises(ConfigError, match=r"train.batch_size = 48: is more than the 41 examples of tsv:.*: use at most 41"):
        batches(1, batch_size=48)
    assert len(batches(2, batch_size=41)) == 2


def test_batch_that_does_not_divide_over_the_hosts(batches):
    with pytest.raises(ConfigError, match=r"batch_size = 8: must be a multiple of the number of processes, 3"):
        batches(1, process_count=3)


def test_seed_out_of_range(batches):
    with pytest.raises(ConfigError, match=r"seed = -1: must lie in"):
        batches(1, seed=-1)


def test_closed_batches(data, tokenizer):
    batches = train_batches(open_source(data), tokenizer, data, image_size=SIZE, batch_size=8, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="these batches are closed"):
        next(batches)


def evaluate(data, batch_size=16, **where):
    with eval_batches(open_source(data), data, image_size=SIZE, batch_size=batch_size, **where) as iterator:
        return list(iterator)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_evaluation_is_complete_in_order_and_not_augmented(data, resize):
    data = config.Data(**(vars(data) | {"resize": resize}))
    seen = evaluate(data)
    assert [b["image"].shape for b in seen] == [(16, SIZE, SIZE, 3)] * 3
    index = np.concatenate([b["index"] for b in seen])
    mask = np.concatenate([b["mask"] for b in seen])
    assert index.dtype == np.int32
    assert index.tolist() == [*range(41), *[-1] * 7]
    assert mask.tolist() == [True] * 41 + [False] * 7
    images = np.concatenate([b["image"] for b in seen])
    source = open_source(data)
    for i in range(41):
        np.testing.assert_array_equal(images[i], fit(decode(source.read(i).image), SIZE, resize))


def test_hosts_share_an_evaluation(data):
    whole = evaluate(data)
    shares = [evaluate(data, process_index=p, process_count=2) for p in range(2)]
    assert_same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares, strict=True)], whole)


def test_evaluation_masks_what_can_not_be_read(data, images_tsv):
    folder = images_tsv.parent / "missing"
    folder.mkdir()
    (folder / "0.png").write_bytes((images_tsv.parent / "0.png").read_bytes())
    path = write_tsv(folder, [("0.png", "number 0"), ("1.png", "number 1")])
    (batch,) = evaluate(Data(spec=f"tsv:{path}"), batch_size=4)
    assert batch["mask"].tolist() == [True, False, False, False]
    assert batch["replaced"].tolist() == [False, True, False, False]


def test_eval_captions(tmp_path):
    rows = [("a.png", "one"), ("b.png", "two"), ("a.png", "eins"), ("c.png", "one")]
    captions = eval_captions(open_source(Data(spec=f"tsv:{write_tsv(tmp_path, rows)}")))
    assert captions.texts == ["one", "eins", "two", "one"]
    assert captions.example.tolist() == [0, 0, 1, 2]
    assert captions.example.dtype == np.int32
    assert captions.keys == ["a.png", "b.png", "c.png"]
    assert captions.place().tolist() == [0, 1, 0, 0]
    assert (captions.per_example(), captions.shared()) == (0, 2)


def test_emoji_labels(emoji_dataset):
    data = Data(spec="emoji", split="test", workers=2)
    source = open_source(data)
    with eval_batches(source, data, image_size=32, batch_size=256) as iterator:
        seen = list(iterator)
    captions = eval_captions(source)
    labels = np.concatenate([b["label"] for b in seen])[: len(source)]
    assert [source.classnames[n] for n in labels] == captions.texts
    assert captions.example.tolist() == list(range(len(source)))
    assert (captions.per_example(), captions.shared()) == (1, 0)


def test_workers_log_as_the_command_line_does(batches, tmp_path, images_tsv, capfd):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes((images_tsv.parent / f"{i}.png").read_bytes() if i else b"torn")
    source = open_source(Data(spec=f"tsv:{write_tsv(tmp_path, [(f'{i}.png', 'a') for i in range(4)])}"))
    batches(2, batch_size=4, source=source, worker_kind="processes", workers=1)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    expected = "example 0.png is replaced by another, because it has an image that can't be used: UnidentifiedImageError: "
    assert lines[0].startswith(f"WARNING: {source.name}: {expected}")


def test_workers_end_cleanly(data, tmp_path):
    """A program that leaves its batches early must end by itself and leave no shared memory behind."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        from clipjax.config import Data
        from clipjax.data.pipeline import train_batches
        from clipjax.data.sources import open_source
        from clipjax.data.tokenizer import Tokenizer

        if __name__ == "__main__":
            data = Data(spec={data.spec!r}, workers=2, worker_kind="processes")
            tokenizer = Tokenizer.train(["number"], 265, lowercase=True, length=8)
            kept = []
            with train_batches(open_source(data), tokenizer, data, image_size=256, batch_size=8, seed=0) as batches:
                for _, batch in zip(range(3), batches):
                    kept.append(batch)
            print(sum(len(b["image"]) for b in kept))
        """)
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "24", "")
