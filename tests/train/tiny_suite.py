"""Both ways to use the pairs of test_hosts.py."""

from clipjax.config import Retrieval, Suite, SuiteMean, SuiteSet, Zeroshot


def suite() -> Suite:
    pairs = "tsv:{root}/pairs.tsv"
    named = Zeroshot(data=pairs, classnames="{root}/names.txt", templates="plain")
    sets = (
        SuiteSet(name="names", evaluation=named, main=("acc1",)),
        SuiteSet(name="pairs", evaluation=Retrieval(data=pairs), main=("text_retrieval_recall@5",)),
    )
    return Suite(sets=sets, means=(SuiteMean(name="both", of=("names", "pairs")),))
