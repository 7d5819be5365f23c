"""OmegaConf's containers as plain dicts and lists, and back into a live one.

Stored is what a config says, not what it means at the moment: interpolations such as `${a.b}` and missing
values (`???`) stay text. OmegaConf is never imported here; whoever has one of its containers has it loaded.
"""

from __future__ import annotations

import sys
from typing import Any


def is_config(value: object) -> bool:
    """Whether `value` is an OmegaConf DictConfig or ListConfig."""
    omegaconf: Any = sys.modules.get("omegaconf")
    return omegaconf is not None and isinstance(value, (omegaconf.DictConfig, omegaconf.ListConfig))


def plain(config: Any, *, names: bool = False) -> Any:
    """A config as dicts, lists and scalars, nothing resolved. With `names`, enum members are their names."""
    omegaconf: Any = sys.modules["omegaconf"]
    return omegaconf.OmegaConf.to_container(config, resolve=False, enum_to_str=names)


def write_back(config: Any, content: Any) -> None:
    """Give a live config this content, which has its keys. Its flags and types stay; what its types do not
    allow is OmegaConf's error."""
    omegaconf: Any = sys.modules["omegaconf"]
    with omegaconf.flag_override(config, ["readonly", "struct"], [False, False]):
        if isinstance(config, omegaconf.ListConfig):
            del config[:]
            config.extend(content)
        else:
            config.merge_with(content)
