"""`tiny_emoji` with all that only training has: heads, and vectors of classes of which each step draws a part."""

import dataclasses

from clipjax.config import Classes, Classify, Head, Run, Softmax
from tests.train import tiny_emoji


def config() -> Run:
    run = tiny_emoji.config()
    model = dataclasses.replace(run.model, heads=(Head(name="a", hidden=32, width=16, scale=10.0),), classes=Classes(count=4000))
    terms = (Softmax(), Softmax(head="a", weight=0.5), Classify(loss="mlcd", sampled=0.1, weight=0.5))
    return dataclasses.replace(run, model=model, objective=terms, data=dataclasses.replace(run.data, labels="own"))
