"""Emoji: classification by name, and retrieval. For runs that train on emoji, and to see what a suite gives."""

from clipjax.config import Retrieval, Suite, SuiteMean, SuiteSet, Zeroshot

RECALLS = ("image_retrieval_recall@1", "text_retrieval_recall@1")


def suite() -> Suite:
    return Suite(
        sets=(
            SuiteSet(
                name="names",
                evaluation=Zeroshot(data="emoji", templates="plain"),
                main=("acc1",),
                protocol="the emoji's names as they are, without a template",
            ),
            SuiteSet(
                name="retrieval",
                evaluation=Retrieval(data="emoji"),
                main=RECALLS,
                main_name="mean_recall@1",
                protocol="half of both directions; every name of an emoji counts",
            ),
        ),
        means=(SuiteMean(name="mean", of=("names", "retrieval")),),
    )
