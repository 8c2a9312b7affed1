"""python -m tools.fuzz COMMAND: see docs/fuzzing.md."""

import argparse
import sys
import tempfile
from pathlib import Path

from . import again, campaign, judges
from .disk import scratch
from .seeds import default_folder, seeds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="damage all seeds, until the time is up or so many mutations are done; goes on where the "
        "last run ended",
    )
    run.add_argument("--minutes", type=float, default=5, help="default: %(default)s")
    run.add_argument(
        "--mutations",
        type=int,
        default=1 << 62,
        help="as many as the summary counts, those of earlier runs included",
    )
    run.add_argument("--jobs", type=int, default=1, help="processes; default: %(default)s")
    run.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="seeds with one of these in their names"
    )
    one = commands.add_parser("one", help="one mutation again, by seed and number")
    one.add_argument("seed")
    one.add_argument("number", type=int)
    for name, about in (
        ("again", "the damage of a fault that was kept"),
        ("min", "a smaller damage with the same fault"),
        ("image", "write the damaged image"),
    ):
        kept = commands.add_parser(name, help=about)
        kept.add_argument("folder", type=Path, metavar="FOUND/FAULT")
        if name == "image":
            kept.add_argument("out", type=Path)
    judged = commands.add_parser("judge", help="our verdict beside that of each format's own checker")
    judged.add_argument("--mutations", type=int, default=200, help="of each seed; default: %(default)s")
    judged.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="seeds with one of these in their names"
    )
    commands.add_parser("seeds", help="make the seeds, and list them")
    for command in commands.choices.values():
        command.add_argument("--seeds", type=Path, help=f"folder of the seeds; default: {default_folder()}")
        command.add_argument(
            "--found",
            type=Path,
            default=default_folder().with_name("found"),
            help="folder of summary and faults; default: %(default)s",
        )
    return parser.parse_args()


def main() -> int:
    """0: nothing was found."""
    arguments = _arguments()
    found, left = seeds(arguments.seeds)
    import_everything()
    if arguments.command == "seeds":
        print("\n".join(f"{name}: {', '.join(map(str, seed.paths))}" for name, seed in found.items()))
    elif arguments.command == "judge":
        with tempfile.TemporaryDirectory(dir=scratch()) as work:
            for name, seed in found.items():
                if not arguments.only or any(word in name for word in arguments.only):
                    for missed in judges.compare(seed, Path(work), arguments.mutations, print):
                        print(f"  {missed.number}: {missed.what}: {missed.said}")
    elif arguments.command == "run":
        summary = campaign.run(
            found,
            arguments.found,
            arguments.jobs,
            arguments.minutes,
            arguments.mutations,
            arguments.only,
            lambda text: print(text, flush=True),
        )
        print(campaign.table(summary))
        print(
            f"{summary['mutations']:,} mutations, {summary['cpu']:.0f} s of processor time; faults: "
            f"{len(summary['faults'])}; {arguments.found}/summary.json"
        )
        print(
            "\n".join(
                f"{fault['count']:6} {name} ({', '.join(fault['seeds'][:4])})"
                for name, fault in summary["faults"].items()
            ),
            end="\n" if summary["faults"] else "",
        )
        for name, reason in left.items():
            print(f"seed left out: {name}: {reason}")
        return 1 if summary["faults"] else 0
    elif arguments.command in ("one", "again"):
        outcome = (
            again.one(found, arguments.seed, arguments.number)
            if arguments.command == "one"
            else again.again(found, arguments.folder)
        )
        print(
            outcome.trace or "",
            f"{outcome.outcome} {outcome.fault}\n{outcome.done}\n{outcome.ran}\n{outcome.cpu:.3f} s, "
            f"{outcome.memory >> 20} MiB",
            sep="",
        )
        return 1 if outcome.fault else 0
    elif arguments.command == "min":
        fault, before, after = again.smaller(found, arguments.folder)
        print(f"{fault}: {before} bytes of damage, {after} are enough")
    else:
        print("\n".join(map(str, again.image(found, arguments.folder, arguments.out))))
    return 0


def import_everything() -> None:
    """Before workers are forked: the modules of all formats and commands."""
    import importlib
    import pkgutil

    import virt_bmap

    for module in pkgutil.walk_packages(virt_bmap.__path__, "virt_bmap."):
        if not module.name.endswith("__main__") and not any(
            part in module.name
            for part in (".watch", ".observe", ".freeze", ".make", ".serve", ".bmaplogger")
        ):
            importlib.import_module(module.name)


if __name__ == "__main__":
    sys.exit(main())
