# SPDX-License-Identifier: MIT
"""Real sound for a first try, out of Debian packages (on Debian or Ubuntu; nothing is installed):

    python .github/demo_audio.py demo        0.9 GB to download, 2.3 GB on disk

demo/pretrain   14.5 h of speech in 40 languages, music and effects, without labels
demo/language   which of 20 languages is a spoken letter in?
demo/drums      which of 6 drums is it?  Drum kits of the test are not in train.
demo/voices     which of 15 game characters speaks?  Phrases of the test are not in train.
"""

import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

PRETRAIN = (
    "tuxpaint-stamps-default fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl "
    "wesnoth-1.16-music wesnoth-1.16-data warzone2100-music colobot-common-sounds sonic-pi-samples"
)
DRUMS = {  # how the kits name them
    "snare": r"snare|^sn",
    "kick": r"kick|^bd|kik",
    "open hat": r"hat.?o|hh.?o|ohh|ho_",
    "closed hat": r"hat.?c|hh.?c|chh|hc_",
    "tom": r"tom",
    "cymbal": r"crash|ride|cymb|splash|china",
}
SOUNDS = (".wav", ".ogg", ".opus", ".flac")
TEST_KITS = ("ForzeeStereo", "HardElectro1", "Millo_MultiLayered3", "Millo-Drums_v.1", "VariBreaks")


def sounds_of(package, out):
    """Download and unpack a package -> the paths of its sounds."""
    folder = out / ".packages" / package
    if not folder.exists():
        print("getting", package, flush=True)
        folder.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        subprocess.run("dpkg-deb -x *.deb . && rm *.deb", shell=True, cwd=folder, check=True)
    paths = [path for path in folder.rglob("*") if path.suffix in SOUNDS]
    return sorted(path for path in paths if not path.is_symlink())


def put(path, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / name)


def main(out):
    for package in PRETRAIN.split():
        for n, path in enumerate(sounds_of(package, out)):
            put(path, out / "pretrain" / package, f"{n:05d}{path.suffix}")

    rng = random.Random(0)
    for n, path in enumerate(sounds_of("klettres-data", out)):
        language = re.search(r"klettres/(\w+)/", str(path))[1]
        split = "train" if rng.random() < 0.7 else "test"
        put(path, out / "language" / split / language, f"{n:05d}{path.suffix}")

    for n, path in enumerate(sounds_of("hydrogen-drumkits", out)):
        drums = [drum for drum, pattern in DRUMS.items() if re.search(pattern, path.stem.lower())]
        if drums:
            split = "test" if path.parent.name in TEST_KITS else "train"
            put(path, out / "drums" / split / drums[0], f"{n:05d}{path.suffix}")

    for n, path in enumerate(sounds_of("hedgewars-data", out)):
        if "voices" in path.parts:
            phrase = path.stem.lower()  # the same names in each voice: "hello", "missed"
            split = "test" if zlib.crc32(phrase.encode()) % 10 < 3 else "train"
            put(path, out / "voices" / split / path.parent.name, f"{n:05d}{path.suffix}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]).absolute())
