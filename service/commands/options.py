"""The options of commands, made from the settings, so that a setting is described in one place."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.settings import Settings


def option(name: str, *flags: str) -> Any:
    """An option whose help, default and variable are those of the setting `name`."""
    field = Settings.model_fields[name]
    default = "none" if field.default is None else str(field.default)
    shown = {"memory": "1GiB", "data": "./ravine-data", "durability": "everysec"}.get(name, default)
    help_ = f"{field.description} [default: {shown}; variable: RAVINE_{name.upper()}]"
    return typer.Option(*(flags or (f"--{name.replace('_', '-')}",)), help=help_, show_default=False)


Data = Annotated[Path | None, option("data")]
RedisUrl = Annotated[str | None, option("redis_url")]


def settings_of(**given: Any) -> Settings:
    """The settings, as the environment has them and the options that were given change them.

    Ends the command with exit code 2, and says what is wrong, where they do not hold.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for fault in error.errors():
            sentence = fault["msg"].removeprefix("Value error, ")
            named = ".".join(map(str, fault["loc"]))  # nothing, where several settings do not go together
            typer.echo(": ".join(filter(None, ("ravine", named, sentence))), err=True)
        raise typer.Exit(2) from None
