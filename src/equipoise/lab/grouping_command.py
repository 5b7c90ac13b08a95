"""The command `equipoise group`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from equipoise.lab.config import ConfigError, RunConfig
from equipoise.lab.own_methods import MethodsOption
from equipoise.lab.shell import complain, writable
from equipoise.text import read as read_call
from equipoise.text import show

DEFAULT = RunConfig.model_construct()


def group(
    data: Annotated[
        str, typer.Option("--data", help="Data set, with options: 'cifar10(tasks=g2)'; see list.")
    ] = "digits-attributes",
    tasks: Annotated[
        str | None, typer.Option(help="Short for the option `tasks` of cifar10: g1, g2.")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(help="Folder with the files of the data set.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(help="How many; default: with the highest silhouette.")
    ] = None,
    by: Annotated[
        str, typer.Option(help="What tells the groups: maps, stl-maps, gradients or lookahead.")
    ] = "maps",
    method: Annotated[str, typer.Option(help="kmeans, hard, cmeans or points.")] = "kmeans",
    fuzziness: Annotated[float, typer.Option(help="Of soft memberships, above 1.")] = 2.0,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Epochs after which maps are taken: 5,10,20; default: ten, evenly."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train specialists and single tasks; print the table.")
    ] = False,
    singles: Annotated[
        bool, typer.Option("--stl/--no-stl", help="Whether the table has single tasks.")
    ] = True,
    full_maps: Annotated[
        bool,
        typer.Option("--full-maps", help="Keep all checkpoints' maps in maps.npy beside them."),
    ] = False,
    combine: Annotated[
        str, typer.Option(help="What specialists sum up: probabilities or logits.")
    ] = "probabilities",
    recipe: Annotated[str, typer.Option(help="By which all networks are trained.")] = "ew",
    model: Annotated[str, typer.Option(help="Network, with options; see list.")] = DEFAULT.model,
    epochs: Annotated[int, typer.Option(help="Passes through the data.")] = DEFAULT.epochs,
    seed: Annotated[int, typer.Option(help="Of weights, order, draws and clustering.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = DEFAULT.batch_size,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of Adam.")] = DEFAULT.lr,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = DEFAULT.device,
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = DEFAULT.precision,
    threads: Annotated[int, typer.Option(help="CPU threads of one run.")] = DEFAULT.threads,
    methods: MethodsOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Networks trained side by side.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/group-DATA.")] = None,
) -> int:
    """Find out which tasks belong together; with --train, train their specialists.

    Given again, the command makes what is missing: finished networks are kept, others go on.
    """
    from equipoise.grouping.clustering import Method
    from equipoise.grouping.specialists import Combine
    from equipoise.lab.comparison import file_name
    from equipoise.lab.grouping import By, Grouping, Plan, evenly

    if tasks is not None:
        try:
            name, options = read_call(data)
        except ValueError as error:
            raise ConfigError(f"data {data!r}: {error}") from error
        data = show(name, {**options, "tasks": tasks})
    config = RunConfig.of(
        recipe=recipe, data=data, data_root=data_root, model=model, epochs=epochs, seed=seed,
        batch_size=batch_size, lr=lr, device=device, precision=precision, threads=threads,
        methods=methods, probes=0,
    )  # fmt: skip
    for name, value, known in (
        ("method", method, get_args(Method)),
        ("by", by, get_args(By)),
        ("combine", combine, get_args(Combine)),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; give {', '.join(known)}.")
    if not fuzziness > 1:
        raise ConfigError(f"fuzziness is {fuzziness}; it must be above 1.")
    if checkpoints is not None and by not in ("maps", "stl-maps"):
        raise ConfigError(f"--checkpoints are of data maps; --by is {by}.")
    plan = Plan(groups, read(checkpoints) or evenly(epochs), method, fuzziness, combine,
                cast(Any, by))  # fmt: skip
    folder = out or Path("runs", f"group-{file_name(config.data)}")
    grouping = Grouping(config, plan, folder, full_maps, singles)
    writable(folder)
    found, choice = grouping.groups()
    if choice is not None:
        print("Silhouettes by the number of groups:")
        print("  ".join(f"{n}: {s:.3f}" for n, s in choice.silhouettes.items()))
    print(f"\n{found}\n\nMemberships: {grouping.folder(found)}")
    print(f"Pictures of what tells them: {grouping.telling.folder / 'pictures'}")
    if not train:
        return 0
    if failures := grouping.train(found, jobs):
        for failure in failures:
            complain(f"{failure}")
        return 1
    print(f"\n{grouping.table(found)}")
    print(f"\nThe specialists together: {grouping.file(found, 'specialists', 'pt')}")
    return 0


def read(checkpoints: str | None) -> tuple[int, ...]:
    """The numbers of "5,10,20".

    Raises:
        ConfigError: they are no increasing numbers of epochs.
    """
    if checkpoints is None:
        return ()
    try:
        found = tuple(int(part) for part in checkpoints.split(","))
    except ValueError:
        found = ()
    if not found or any(a >= b for a, b in zip((0, *found), found, strict=False)):
        raise ConfigError(f"checkpoints {checkpoints!r} cannot be read; write 5,10,20.")
    return found
