"""Real data with a name: found under ``POLYHEAD_DATA``, or fetched from its public home."""

from __future__ import annotations

import bz2
import csv
import gzip
import os
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyhead.errors import DataNotFoundError, InputError
from polyhead.paths import home

__all__ = ["SentencePairs", "data_folder", "load_sts", "load_texts"]

_STS_FILES = {
    2012: ("MSRpar", "OnWN", "SMTeuroparl", "SMTnews"),
    2013: ("FNWN", "OnWN", "headlines"),
    2014: ("OnWN", "deft-forum", "deft-news", "headlines", "images", "tweet-news"),
    2015: ("answers-forums", "answers-students", "belief", "headlines", "images"),
}
_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/test.csv"


def data_folder(name: str, files: dict[str, str]) -> Path:
    """The folder of a data set's files: under ``POLYHEAD_DATA``, else a download kept below ``POLYHEAD_HOME``.

    Args:
        name: of the data set, and of its folder.
        files: file name -> public address; "" where there is none to fetch it from.

    Raises:
        DataNotFoundError: neither here nor at its home; says what was tried and what to do.
    """
    given = os.environ.get("POLYHEAD_DATA")
    if given:
        folder = Path(given) / name
        if all((folder / file).is_file() for file in files):
            return folder
    folder = home() / "data" / name
    for file, address in files.items():
        if not (folder / file).is_file():
            _download(name, address, folder / file, given)
    return folder


def _download(name: str, address: str, target: Path, given: str | None) -> None:
    looked = f"'{Path(given) / name}' does not hold {target.name}" if given else "POLYHEAD_DATA is not set"
    if not address:
        raise DataNotFoundError(
            f"The data set '{name}' is not here: {looked}, and its home offers no such file to fetch. Make "
            f"{target.relative_to(home() / 'data')} from its public release, put it into a folder, and set "
            "POLYHEAD_DATA to that folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(address, timeout=60) as response, partial.open("wb") as file:
            if address.endswith(".bz2") and target.suffix == ".gz":  # as its public home packs it, and as we keep it
                with bz2.open(response) as unpacked, gzip.open(file, "wb") as packed:
                    shutil.copyfileobj(unpacked, packed)
            else:
                shutil.copyfileobj(response, file)
        partial.replace(target)  # a file with its final name is a whole file
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataNotFoundError(
            f"The data set '{name}' is not here: {looked}, and {address} could not be fetched ({error}). Put its files "
            f"into a folder '{name}' and set POLYHEAD_DATA to the folder around it."
        ) from error


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences with how alike people found them.

    Attributes:
        name: such as "sts-2015".
        pairs: ``[n]`` of two sentences.
        gold: ``[n]`` float64, 0 (unrelated) to 5 (the same).
        group: ``[n]`` which file each pair is from.
    """

    name: str
    pairs: list[tuple[str, str]]
    gold: np.ndarray
    group: list[str]

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, n: int, seed: int = 0) -> SentencePairs:
        """``n`` of the pairs at random, in their order; all where there are no more than that."""
        if n >= len(self):
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return SentencePairs(self.name, [self.pairs[i] for i in rows], self.gold[rows], [self.group[i] for i in rows])


def load_sts(year: int = 2015) -> SentencePairs:
    """The scored test pairs of SemEval's semantic textual similarity task, 2012 to 2015.

    Read from ``POLYHEAD_DATA/sts/YEAR/NAME.test.tsv``: lines of score (empty where a pair was not scored), sentence,
    sentence.

    Raises:
        InputError: a year without data. DataNotFoundError: the data is neither here nor at its home.
    """
    if year not in _STS_FILES:
        raise InputError(f"No STS data of {year}: expected one of {', '.join(map(str, _STS_FILES))}.")
    # SemEval gives archives of two files a set, in a form of its own a year: nothing to fetch as it is.
    folder = data_folder("sts", {f"{year}/{name}.test.tsv": "" for name in _STS_FILES[year]})
    pairs, gold, group = [], [], []
    for name in _STS_FILES[year]:
        for line in (folder / f"{year}/{name}.test.tsv").read_text(encoding="utf-8").splitlines():
            score, first, second = line.split("\t")[:3]
            if score:  # SemEval scored a part of the pairs only
                pairs.append((first, second))
                gold.append(float(score))
                group.append(name)
    return SentencePairs(f"sts-{year}", pairs, np.array(gold), group)


def load_texts(name_or_file: str, limit: int | None = None) -> list[str]:
    """Texts to run a model on: "ag-news" (news items), "sts-YEAR" (sentences), or a text file with one text a line.

    Args:
        name_or_file: what to read.
        limit: at most so many, from the beginning.

    Raises:
        InputError: neither a known name nor a file, or a file without text.
    """
    if name_or_file == "ag-news":
        file = data_folder("ag-news", {"test.csv": _AG_NEWS}) / "test.csv"
        with file.open(encoding="utf-8", newline="") as stream:
            texts = [f"{title}. {text}".replace("\\", " ") for _, title, text in csv.reader(stream)]
    elif name_or_file.startswith("sts-") and name_or_file[4:].isdigit():
        texts = [sentence for pair in load_sts(int(name_or_file[4:])).pairs for sentence in pair]
    elif Path(name_or_file).is_file():
        lines = Path(name_or_file).read_text(encoding="utf-8").splitlines()
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise InputError(f"'{name_or_file}' holds no text; expected one text a line.")
    else:
        raise InputError(
            f"No texts '{name_or_file}': expected ag-news, sts-2012 to sts-2015, or a file with one text a line."
        )
    return texts[:limit]
