"""Several views of an image, changed copies of a caption, captions in fixed places; hue, grey and blur."""

import colorsys
import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clipjax.config import Augment, ConfigError, Data, Filter, Part, TextAugment, View
from clipjax.data.captions import changed
from clipjax.data.faults import FAULTS, NO_CAPTION
from clipjax.data.images import image as images
from clipjax.data.images.augment import recolour
from clipjax.data.images.image import training
from clipjax.data.pipeline import check_source, train_batches
from clipjax.data.source import Record, Source
from clipjax.data.tokenizer import Tokenizer

SIZE = 12
STRONG = dict(crop=0.2, flip=True, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, gray=0.2, blur=0.5)


def noise(side=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def stored(image=None, form="png"):
    file = io.BytesIO()
    (image or noise()).save(file, form)
    return file.getvalue()


def drawn(seed=3, image=None, **fields):
    return training(image or stored(), SIZE, Data(spec="emoji", **fields), np.random.default_rng(seed))


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_view_is_what_it_is_whatever_the_others_are(form):
    """The first is that of data.augment; each has draws of its own."""
    image, weak, strong = stored(noise(64), form), View(crop=0.5), View(**STRONG)
    one = drawn(image=image, augment=Augment(**STRONG))
    assert one.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(drawn(image=image, views=(strong,)), one)
    two, three = drawn(image=image, views=(strong, weak)), drawn(image=image, views=(View(), weak, strong))
    assert three.shape == (3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(two[0], one)
    np.testing.assert_array_equal(two[1], three[1])
    assert len({view.tobytes() for view in drawn(image=image, views=(weak, weak, weak))}) == 3
    assert drawn(seed=4, image=image, views=(strong, weak)).tobytes() != two.tobytes()


def test_a_large_jpeg_is_decoded_once_at_a_scale_that_serves_all_views(monkeypatch):
    scales, draft = [], images._draft
    monkeypatch.setattr(images, "_draft", lambda *args: scales.append(draft(*args)) or scales[-1])
    image = stored(noise(200), "jpeg")
    for seed in range(20):
        drawn(seed, image, views=(View(), View(crop=0.001)))
    assert len(scales) == 20
    assert len(set(scales)) > 1  # 200 pixels for 12, but a small crop has few
    drawn(image=image, views=(View(), View()))
    assert scales[-1] == 8


def test_hue_turns_each_pixel_on_the_circle():
    """By a share of the circle, in Pillow's 256ths: within 8 bits of the same in real numbers."""
    image = noise()
    for seed in range(4):
        turn = np.random.default_rng(seed).uniform(-0.5, 0.5)
        got = np.asarray(recolour(image, Augment(hue=0.5), np.random.default_rng(seed))).astype(int)
        hsv = np.apply_along_axis(lambda c: colorsys.rgb_to_hsv(*c), 2, np.asarray(image) / 255)
        hsv[..., 0] = (hsv[..., 0] + int(turn * 255) / 256) % 1
        want = 255 * np.apply_along_axis(lambda c: colorsys.hsv_to_rgb(*c), 2, hsv)
        assert np.abs(got - want).mean() < 2.5
        assert np.abs(got - np.asarray(image)).mean() > 20 or abs(turn) < 0.1


def test_grey_is_the_luma_of_itu_601():
    image = noise()
    luma = np.asarray(image) @ [0.299, 0.587, 0.114]
    grey = np.asarray(recolour(image, Augment(gray=1.0), np.random.default_rng(0)))
    assert np.abs(grey - luma[..., None]).max() <= 1


def test_blur_is_pillows_of_a_drawn_radius():
    image = noise()
    got = np.asarray(recolour(image, Augment(blur=1.0), np.random.default_rng(1)))
    rng = np.random.default_rng(1)
    rng.random()  # whether it is blurred
    np.testing.assert_array_equal(got, image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))))
    assert got.std() < 0.6 * np.asarray(image).std()


@pytest.mark.parametrize("field", ["jitter", "gray", "blur"])
def test_a_probability_is_how_often_it_happens(field):
    image = noise(4)
    how = Augment(**{field: 0.3}, **({"hue": 0.5} if field == "jitter" else {}))
    touched = [np.any(np.asarray(recolour(image, how, np.random.default_rng(i))) != np.asarray(image)) for i in range(600)]
    assert np.mean(touched) == pytest.approx(0.3, abs=0.06)


WORDS = " ".join("abcdefghij")


def test_words_are_left_out_and_change_places():
    rng = np.random.default_rng(0)
    copies = [changed(WORDS, TextAugment(delete=0.3, swap=0.0), rng).split() for _ in range(300)]
    assert all(copy == sorted(copy) for copy in copies)
    assert np.mean([len(copy) for copy in copies]) == pytest.approx(7, abs=0.3)
    swapped = [changed(WORDS, TextAugment(delete=0.0, swap=1.0), rng).split() for _ in range(300)]
    assert all(sorted(copy) == WORDS.split() and copy != WORDS.split() for copy in swapped)
    assert changed(WORDS, TextAugment(delete=0.0, swap=0.0), rng) == WORDS
    assert {len(changed(WORDS, TextAugment(delete=1.0), rng)) for _ in range(50)} == {1}  # one word stays, any of them
    assert len({changed(WORDS, TextAugment(delete=1.0), rng) for _ in range(100)}) == 10
    assert changed("一二三", TextAugment(delete=0.9, swap=0.9), rng) == "一二三"


class Languages(Source):
    """Number i in four languages, as `en 3`; every fourth example has no more than two."""

    name, fields = "languages", {}

    def __init__(self, count=40):
        super().__init__()
        self.count = count

    def __len__(self):
        return self.count

    def _record(self, i):
        languages = ("en", "ja", "zh", "de")[: 2 if i % 4 == 0 else 4]
        return Record(stored(Image.new("RGB", (4, 4), (i, 0, 0))), tuple(f"{name} {i}" for name in languages), f"key {i}")


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(Languages().captions(), 300, lowercase=True, length=8)


def batches(words, steps, start=0, host=0, hosts=1, **fields):
    data = Data(**({"spec": "emoji", "workers": 2} | fields))
    where = dict(image_size=SIZE, batch_size=8, seed=5, start_step=start, process_index=host, process_count=hosts)
    with train_batches(Languages(), words, data, **where) as stream:
        return list(itertools.islice(stream, steps))


def texts(batch, words):
    return [[words.decode(row) for row in several] for several in batch["text"]]


def test_a_batch_of_views_and_copies_on_any_workers_hosts_and_from_any_step(words):
    fields = dict(views=(View(crop=0.5), View(**STRONG)), text_augment=TextAugment(delete=0.3, swap=0.3, count=2))
    whole = batches(words, 4, **fields)
    assert whole[0]["image"].shape == (8, 2, SIZE, SIZE, 3)
    assert whole[0]["text"].shape == (8, 3, 8)
    assert whole[0]["truncated"].shape == (8, 3)
    for caption, *copies in texts(whole[1], words):
        assert all(set(copy.split()) <= set(caption.split()) for copy in copies)
    for again in (batches(words, 2, start=2, **fields), batches(words, 4, workers=3, **fields)[2:]):
        for got, want in zip(again, whole[2:], strict=True):
            assert all(np.array_equal(got[name], want[name]) for name in want)
    halves = [batches(words, 1, host=host, hosts=2, **fields)[0]["image"] for host in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), whole[0]["image"])


def test_copies_change_nothing_else(words):
    fields = dict(augment=Augment(**STRONG))
    (plain,), (copied,) = batches(words, 1, **fields), batches(words, 1, text_augment=TextAugment(count=1), **fields)
    np.testing.assert_array_equal(copied["text"][:, 0], plain["text"])
    np.testing.assert_array_equal(copied["image"], plain["image"])


@pytest.mark.parametrize("conditions", [Filter(), Filter(max_characters=4)])
def test_captions_in_places_and_examples_without_one(words, conditions):
    """An example that lacks a language is bad; one with a caption too long in one of the places is left out."""
    for batch in batches(words, 3, captions=(2, 0), filter=conditions):
        for index, fault, filtered, (zh, en) in zip(
            batch["index"].tolist(), batch["fault"].tolist(), batch["filtered"].tolist(), texts(batch, words), strict=True
        ):
            number = int(en.split()[1])
            assert (zh, en) == (f"zh {number}", f"en {number}")
            assert number % 4
            assert number < 10 or not conditions.max_characters
            assert fault == (1 + FAULTS.index(NO_CAPTION) if index % 4 == 0 else 0)
            assert filtered == bool(index % 4 and index >= 10 and conditions.max_characters)


def test_a_mixture_has_the_views_of_all_its_parts():
    data = Data(sources=(Part(spec="emoji"), Part(spec="emoji", filter=Filter(min_side=9))), views=(View(), View(flip=True)))
    assert [part.views for part in data.parts] == [data.views] * 2


def test_places_that_no_example_has_are_refused():
    check_source(Languages(), Data(spec="emoji", captions=(3,)), 8)
    with pytest.raises(ConfigError, match=r"^data\.captions = \(0, 4\): no example of languages has more than 4 captions \(40"):
        check_source(Languages(), Data(spec="emoji", captions=(0, 4)), 8)


def test_the_main_caption_is_the_first_of_the_places(words):
    (batch,) = batches(words, 1, captions=(1, 0), ids="caption")
    (other,) = batches(words, 1, captions=(0, 1), ids="caption")
    assert not set(batch["id"].tolist()) & set(other["id"].tolist())
    with pytest.raises(ConfigError, match=r"^data\.captions = \(1, 0\): must begin with 0, the main caption, whose vectors"):
        dataclasses.replace(Data(spec="emoji", captions=(1, 0)), teacher="teacher.npz")
