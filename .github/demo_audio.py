# SPDX-License-Identifier: MIT
"""Real sound for a first try, out of Debian packages (on Debian or Ubuntu; nothing is installed):

    python .github/demo_audio.py demo            14.5 h to train on, and the tasks
    python .github/demo_audio.py demo --more     44 h to train on

demo/pretrain   speech in 15 languages, music and effects, without labels
demo/1h.txt     random recordings of demo/pretrain, an hour in all; demo/4h.txt, four hours
demo/more       the same as demo/pretrain and 30 h out of other packages (with --more)

Six labelled tasks in folds, each of which is tested once, after training on the others. No task
shares a package with the sound to train on, and no file is in a task twice.

demo/voices     which of 15 game characters speaks?     A fold has phrases of its own.
demo/letters    which of 20 languages is spoken?        A fold has letters of its own, by language.
demo/drums      which of 6 drums is it?                 A fold has drum kits of its own.
demo/effects    explosion, step, jump, coin, ...?       A fold has games of its own.
demo/music      which of 9 soundtracks?                 A fold has pieces of its own.
demo/tones      which of 4 tones has the syllable?      A fold has a speaker of its own.

Drums and effects are labelled by the names of their files.
"""

import hashlib
import random
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import soundfile

PRETRAIN = (
    "tuxpaint-stamps-default fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl "
    "wesnoth-1.16-music wesnoth-1.16-data warzone2100-music colobot-common-sounds sonic-pi-samples"
)
MORE = (
    "asc-music asterisk-core-sounds-en-wav asterisk-core-sounds-es-wav "
    "asterisk-core-sounds-fr-wav asterisk-core-sounds-it-wav asterisk-core-sounds-ru-wav "
    "asterisk-moh-opsound-wav asterisk-prompt-it-menardi-wav berusky2-data festvox-ru flare-game "
    "freecol freedink-data freedroidrpg-data freeorion-data frozen-bubble-data gigalomania-data "
    "kajongg krank ktuberling-data lincity-ng-data lomiri-sounds marsshooter-data megaglest-data "
    "naev-data nexuiz-music planetblupi-common planetblupi-music-ogg plee-the-bear-data "
    "qabcs-data scratch starfighter-data supertux-data supertuxkart-data torcs-data triplea "
    "ufoai-music unknown-horizons widelands-data"
)
DRUMS = {  # how the kits name them
    "snare": r"snare|^sn",
    "kick": r"kick|^bd|kik",
    "open hat": r"hat.?o|hh.?o|ohh|ho_",
    "closed hat": r"hat.?c|hh.?c|chh|hc_",
    "tom": r"tom",
    "cymbal": r"crash|ride|cymb|splash|china",
}
EFFECTS = {  # how games name them; (?!...) and (?<!...) leave out what only looks like it
    "coin": r"coin|pick.?up|bonus|power.?up|collect|treasure",
    "engine": r"engine(?!er)|motor|thrust|jet",
    "explosion": r"explo|boom(?!erang)|blast(?!er)",
    "jump": r"jump(?! )|bounce|boing",  # not the "jump drive" of a spaceship
    "menu": r"click|button|menu|^select|select_|beep",  # not a voice: "engineer_select"
    "pain": r"pain|hurt|(?<!bir)(?<![._])die(?!r)|death|dead|scream|ouch|(?<!la)ugh",
    "shot": r"laser|(?<!head|nice)(?<!lucky|bank_)shot|shoot|gun(?!powder)|rifle|cannon(?!_)",
    "step": r"(?<!zap)step|walk$",
    "water": r"water|splash|swim|(?<![td ])rain|bubble|drip",
}
GAMES = (  # dealt out to the folds in this order, so that no fold has most of the steps
    "ardentryst minetest-data redeclipse-data lugaru-data boswars-data btanks-data bzflag-data "
    "caveexpress-data chromium-bsu-data cube2-data endless-sky-data enigma-data mazeofgalious-data "
    "meritous-data netpanzer-data neverball-common overgod-data pekka-kana-2-data powermanga-data "
    "scorched3d-data searchandrescue-data titanion-data trackballs-data warmux-data wordwarvi-sound"
)
SOUNDTRACKS = (
    "davegnukem-data drascula-music extremetuxracer-data fretsonfire-songs-muldjord "
    "fretsonfire-songs-sectoid hyperrogue-music pushover-data singularity-music wizznic-data"
)
SOUNDS = (".wav", ".ogg", ".opus", ".flac", ".mp3", ".aiff")


def sounds_of(package, out):
    """Download and unpack a package -> the paths of its sounds."""
    folder = out / ".packages" / package
    if not (folder / "usr").exists():  # or a download was interrupted
        print("getting", package, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        subprocess.run("dpkg-deb -x *.deb . && rm *.deb", shell=True, cwd=folder, check=True)
        for archive in folder.rglob("*.pk3"):
            zipfile.ZipFile(archive).extractall(archive.parent)
            archive.unlink()
        for path in folder.rglob("*"):
            if path.is_symlink() or (path.is_file() and path.suffix not in SOUNDS):
                path.unlink()
    return sorted(path for path in folder.rglob("*") if path.suffix in SOUNDS)


def seconds(path):
    """The length of a sound; 0 if it cannot be read."""
    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError:
        return 0.0


def fold_of(name, folds):
    """The same name is always in the same fold."""
    return f"fold{1 + zlib.crc32(name.encode()) % folds}"


def put(path, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / name)


def match(path, patterns):
    """The first class whose pattern is in the name of a file, or None."""
    for name, pattern in patterns.items():
        if re.search(pattern, path.stem.lower()):
            return name
    return None


def pretrain(packages, folder, out):
    for package in packages.split():
        for n, path in enumerate(sounds_of(package, out)):
            put(path, folder / package, f"{n:05d}{path.suffix}")


def random_hours(hours, out):
    """List random recordings of demo/pretrain. The list of 4 h begins with that of 1 h."""
    paths = sorted(path for path in (out / "pretrain").rglob("*") if path.is_file())
    random.Random(0).shuffle(paths)
    missing = 3600 * hours
    chosen = []
    for path in paths:
        if missing > 0:
            chosen.append(str(path))
            missing -= seconds(path)
    (out / f"{hours}h.txt").write_text("\n".join(chosen) + "\n")


def voices(out):
    for n, path in enumerate(sounds_of("hedgewars-data", out)):
        if "voices" in path.parts:
            phrase = path.stem.lower().rstrip("0123456789")  # in each voice: "hello", "ow1", "ow2"
            put(path, out / "voices" / fold_of(phrase, 4) / path.parent.name, f"{n:05d}.ogg")


def letters(out):
    """At most 60 letters and syllables of each language, spoken by one or two people."""
    paths = sounds_of("klettres-data", out)
    for language in sorted({path.parts[-3] for path in paths}):
        spoken = [path for path in paths if path.parts[-3] == language]
        for n, path in enumerate(spoken[:: 1 + len(spoken) // 60]):
            fold = fold_of(path.stem, 4)  # the same names in most languages: "a", "ba", "a-01"
            put(path, out / "letters" / fold / language, f"{n:05d}{path.suffix}")


def drums(out):
    paths = sounds_of("hydrogen-drumkits", out) + sounds_of("hydrogen-data", out)
    kits = sorted({path.parent.name for path in paths})
    for n, path in enumerate(paths):
        drum = match(path, DRUMS)
        if drum is not None:
            fold = f"fold{1 + kits.index(path.parent.name) % 4}"
            put(path, out / "drums" / fold / drum, f"{n:05d}{path.suffix}")


def effects(out):
    for g, game in enumerate(GAMES.split()):
        fold = f"fold{1 + g % 4}"
        for n, path in enumerate(sounds_of(game, out)):
            effect = match(path, EFFECTS)
            if effect is not None and 0 < seconds(path) < 10:
                put(path, out / "effects" / fold / effect, f"{game}-{n:05d}{path.suffix}")


def music(out):
    """Four excerpts of 10 s from each piece."""
    for package in SOUNDTRACKS.split():
        pieces = [path for path in sounds_of(package, out) if seconds(path) >= 45]
        pieces = [path for path in pieces if path.stem != "guitar"]  # of the same piece as song.ogg
        for n, path in enumerate(pieces):
            sound = soundfile.info(path)
            folder = out / "music" / f"fold{1 + n % 4}" / package
            folder.mkdir(parents=True, exist_ok=True)
            for quarter in range(4):
                start = round((0.1 + 0.2 * quarter) * sound.frames)
                samples, rate = soundfile.read(path, 10 * sound.samplerate, start)
                soundfile.write(folder / f"{n:03d}-{quarter}.flac", samples, rate)


def tones(out):
    """Mandarin syllables, each in 3.ogg and in 5.ogg, by two speakers. The name of a folder is a
    syllable in Bopomofo and the number of its tone. The first tone has no number, and 1 is the
    neutral tone, which is rare."""
    for n, path in enumerate(sounds_of("gcin-voice", out)):
        number = path.parent.name[-1]
        if number == "1":
            continue
        tone = "tone1"
        if number in "234":
            tone = f"tone{number}"
        fold = "fold1"
        if path.stem == "5":
            fold = "fold2"
        put(path, out / "tones" / fold / tone, f"{n:05d}.ogg")


def remove_copies(task):
    """Keep one of the files that are alike, and none if their labels differ."""
    copies = defaultdict(list)
    for path in sorted(task.rglob("*.*")):
        copies[hashlib.md5(path.read_bytes()).digest()].append(path)
    for paths in copies.values():
        labels = {path.parent.name for path in paths}
        if len(labels) == 1:
            paths = paths[1:]
        for path in paths:
            path.unlink()


def main(out, more):
    pretrain(PRETRAIN, out / "pretrain", out)
    random_hours(1, out)
    random_hours(4, out)
    if more:
        pretrain(PRETRAIN, out / "more", out)
        pretrain(MORE, out / "more", out)
    for task in (voices, letters, drums, effects, music, tones):
        task(out)
        remove_copies(out / task.__name__)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]).absolute(), "--more" in sys.argv)
