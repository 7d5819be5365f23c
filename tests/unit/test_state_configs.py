"""Configs of OmegaConf, played by classes that keep what they are told and refuse to guess."""

import collections.abc
import contextlib
import sys
import types

import pytest

from ckptvcs.errors import StateMismatchError
from ckptvcs.history.commit import plain_config
from ckptvcs.state import configs, tree
from ckptvcs.state.restore import fill
from ckptvcs.testing.memory import MemoryStore


class _Config:
    def __init__(self, content):
        self._content = content
        self.flags = {"readonly": True}

    def __len__(self):
        return len(self._content)

    def __iter__(self):
        return iter(self._content)

    def __getitem__(self, key):
        raise AssertionError("reading a value resolves it")

    def _writable(self):
        assert self.flags.get("readonly") is False
        return self._content


class DictConfig(_Config, collections.abc.MutableMapping):
    __setitem__ = __delitem__ = None

    def merge_with(self, content):
        self._writable().update(content)


class ListConfig(_Config, collections.abc.MutableSequence):
    __setitem__ = None

    def __delitem__(self, index):
        del self._writable()[index]

    def insert(self, index, value):
        self._writable().insert(index, value)


class OmegaConf:
    @staticmethod
    def to_container(config, *, resolve, enum_to_str):
        assert resolve is False
        return plain(config)


def plain(value):
    if isinstance(value, DictConfig):
        return {key: plain(each) for key, each in value._content.items()}
    if isinstance(value, ListConfig):
        return [plain(each) for each in value._content]
    return value


@contextlib.contextmanager
def flag_override(config, names, settings):
    before = config.flags
    config.flags = dict(zip(names, settings, strict=True))
    yield
    config.flags = before


@pytest.fixture(autouse=True)
def omegaconf(monkeypatch):
    module = types.ModuleType("omegaconf")
    for each in (DictConfig, ListConfig, OmegaConf, flag_override):
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, "omegaconf", module)


def config(rate, layers):
    return DictConfig(
        {"lr": rate, "rate": "${lr}", "missing": "???", "net": DictConfig({"layers": ListConfig(layers)})}
    )


PLAIN = {"lr": 0.1, "rate": "${lr}", "missing": "???", "net": {"layers": [1, "${lr}"]}}


def test_what_is_stored_is_what_a_config_says():
    state = {"cfg": config(0.1, [1, "${lr}"]), "list": ListConfig([1, 2]), "step": 3}
    store = MemoryStore()
    id = tree.write(store, state).tree
    assert tree.read(store, id) == {"cfg": PLAIN, "list": [1, 2], "step": 3}
    assert tree.write(store, {"cfg": PLAIN, "list": [1, 2], "step": 3}).tree == id
    assert plain_config(config(0.1, [1, "${lr}"])) == PLAIN
    assert plain_config({"a": ListConfig([1])}) == {"a": [1]}
    into = {"cfg": config(0.5, []), "list": ListConfig([7]), "step": 0}
    same = dict(into)
    fill(store, id, into)
    assert into["cfg"] is same["cfg"]
    assert plain(into["cfg"])["rate"] == "${lr}"
    assert into["cfg"]._content["net"] == {"layers": [1, "${lr}"]}
    assert into["cfg"].flags == {"readonly": True}
    assert plain(into["list"]) == [1, 2]
    assert into["step"] == 3


def test_keys_are_compared():
    store = MemoryStore()
    id = tree.write(store, {"cfg": {"lr": 1, "new": 2}}).tree
    with pytest.raises(StateMismatchError) as caught:
        fill(store, id, {"cfg": DictConfig({"lr": 0, "old": 0})})
    assert (caught.value.missing, caught.value.unexpected) == (("cfg/old",), ("cfg/new",))


def test_without_omegaconf_nothing_is_a_config(monkeypatch):
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert not configs.is_config(config(1, []))
