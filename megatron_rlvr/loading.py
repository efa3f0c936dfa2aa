"""Files that are found by their name, a verifier's or a method's: what is wrong in one is said in a line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlvr.config_reading import ConfigError


@contextmanager
def loading(what: str, file: Path) -> Iterator[None]:
    """Around the import of ``file``, or the making of its class. Raises ConfigError.

    The file's own ConfigError as it is, any other exception as one that names ``what`` it is, file and line.

    with loading("verifier 'a.py'", Path("a.py")): ...
    -> ConfigError: verifier 'a.py' cannot be loaded: a.py, line 3: ModuleNotFoundError: No module named 'sympi'. ...
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # the file's own code runs here, and may raise anything
        if isinstance(error, SyntaxError):  # which may be of a file that this one imports
            place, line, said = error.filename or str(file), error.lineno, error.msg
        else:
            place, said = str(file), str(error)
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
            line = lines[-1] if lines else None  # none where it cannot even be read
        at = f"{place}, line {line}" if line else place
        raise ConfigError(
            f"{what} cannot be loaded: {at}: {type(error).__name__}: {said}. Mend the file, or install what it imports"
        ) from error
