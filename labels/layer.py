"""What a user has measured for an index that ships, and so is not to be written: calibrations in a file of their own.

They lie before those of the index itself, and search reads both as one. A file that is damaged, made otherwise or of
another SAE is left out: what ships stays of use without it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from urllib.parse import quote

from labels.schema import check_header

_COLUMNS = "latent, sweet, cliff, steerability, made, data"
_SAE = "(SELECT value FROM {}.meta WHERE key = 'sae/sae.safetensors')"


def lay(db: sqlite3.Connection, layer: Path | None) -> str:
    """Makes `calibration`, which search reads: the layer's rows, and those of the index where the layer has none.

    What comes back says why the layer was left out; "" where it was not, where there is none, or of another SAE.
    """
    own, above, notice = f"SELECT {_COLUMNS} FROM main.calibrations", "", ""
    try:
        if layer is not None and layer.exists() and _attach(db, layer):
            above = f"SELECT {_COLUMNS} FROM layer.calibrations UNION ALL "
            own += " WHERE latent NOT IN (SELECT latent FROM layer.calibrations)"
    except (OSError, ValueError, sqlite3.Error) as error:
        what = "it is damaged, or another program writes to it" if isinstance(error, sqlite3.Error) else error
        why = error if isinstance(error, ValueError) else f"`{layer}` cannot be read: {what}"
        hint = "move it away, and `steer calibrate` begins a new one"
        notice = f"what was measured here is left out: {why}; {hint}"
    db.execute(f"CREATE TEMP VIEW calibration AS {above}{own}")
    return notice


def _attach(db: sqlite3.Connection, layer: Path) -> bool:
    """Opens the layer beside the index; whether it is of the same SAE. All of it is looked at first, since what is
    damaged further in would only be met in the middle of a search."""
    check_header(layer)
    db.execute("ATTACH ? AS layer", [f"file:{quote(str(layer.absolute()))}?mode=ro"])
    if db.execute("PRAGMA layer.quick_check(1)").fetchone() != ("ok",):
        raise sqlite3.DatabaseError
    db.execute(f"SELECT {_COLUMNS} FROM layer.calibrations LIMIT 0")
    return bool(db.execute(f"SELECT {_SAE.format('layer')} IS {_SAE.format('main')}").fetchone()[0])
