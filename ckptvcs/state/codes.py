"""The extension codes of tree encodings: format-normative, append-only.

A tree object's body is one canonical value (`ckptvcs.canonical`). None, bool, int, float, str, bytes,
list and dict stand for themselves; their subclasses never do. Everything else is `Tagged(code, payload)`
whose payload is again a canonical value, given below. *node* is an encoded state value (itself maybe
tagged), *list* a list node or a LIST_PAGES or SUBTREE in its place, *map* a dict node or a MAP_PAGES or
SUBTREE in its place. *pos* is a position in the object's own reference table (an integer from 0);
the table holds each id once, in the order in which the body first names it. Chunk lists are the
exception: a table with repetitions and no body.

    code  name              payload
      2   TUPLE             list
      3   NAMEDTUPLE        [type name, [field name, ...], list]
      4   SET               list, sorted by the elements' encodings
      5   FROZENSET         list, sorted by the elements' encodings
      6   ORDERED_DICT      [map] or [map, node of the `_metadata` attribute]
      7   DEFAULT_DICT      [factory name or nil, map]
      8   DEQUE             [maximal length or nil, list]
      9   COMPLEX           [real, imaginary]
     10   BYTEARRAY         bytes
     11   BLOB              ["str" | "bytes" | "bytearray", bytes in all, data]   (longer than grid.subtree)
     12   PATH              [class name, text]
     13   DATETIME          [year, month, day, hour, minute, second, microsecond, fold, zone node]
     14   DATE              [year, month, day]
     15   TIME              [hour, minute, second, microsecond, fold, zone node]
     16   TIMEDELTA         [days, seconds, microseconds]
     17   TIMEZONE          [microseconds east of UTC, name or nil]
     18   ZONEINFO          key
     19   NAMESPACE         map   (argparse.Namespace)
     20   SIMPLE_NAMESPACE  map   (types.SimpleNamespace)
     21   ENUM              [type name, member name or nil, value node]
     22   DATACLASS         [type name, map of fields]
     23   RANGE             [start, stop, step]
     24   SLICE             [start node, stop node, step node]
     25   ELLIPSIS          nil
     26   RANDOM            [version, bytes of 625 words of 32 bit, normal deviate or nil]   (random.Random)
     30   NUMPY_SCALAR      [dtype name, bytes]
     31   NUMPY_DTYPE       [dtype name, flags]
     32   NUMPY_GENERATOR   [class name, bit generator name, {field: integer, bytes or fields},
                             normal deviate or nil, seed sequence or nil]
     40   TENSOR            [framework, dtype name, shape, flags, layout, data]
     41   SPARSE            [layout name, shape, flags, {component name: TENSOR}]
     42   QUANTIZED         [dtype name, scheme name, flags, axis or nil, {component name: TENSOR or number}]
     43   TORCH_SIZE        [int, ...]
     44   TORCH_DTYPE       dtype name
     45   TORCH_DEVICE      text, such as "cpu" or "cuda:1"
     46   TORCH_GENERATOR   [device text, TENSOR of the state]
     47   COUNTER           map   (collections.Counter)
     48   TORCH_SUBCLASS    [type name, shape, flags, {component name: node}, node of the context]
     49   TORCH_CONSTANT    [kind, name]: "layout", "memory_format" or "qscheme"
     60   SUBTREE           pos of a tree whose body is the node
     61   MAP_PAGES         [level, [pos, ...]] of trees: dicts at level 0, else MAP_PAGES one level less
     62   LIST_PAGES        [level, [pos, ...]] likewise with lists
     63   ROOT              {"state": node, "files": node}, either may be absent; the body of a commit's tree
     64   FILE              [size, mode, BLAKE3 of the file, splitter id, data]
     65   LINK              target text of a symbolic link
     66   TENSOR_FILE       [size, mode, BLAKE3 of the file, format, data, map of [int, TENSOR] by path]

*Type name* is "module:qualname". *Framework* is "numpy" or "torch". *Data* is the bytes themselves (at most
grid.inline of them), or [pos, ...] of its chunks in order, or {"list": pos} of its chunk list when there
are more than grid.chunk_list chunks. *Layout* is nil for C order, or the dimensions from the outermost in
memory to the innermost, or {"alias": [group, byte offset in the group, byte strides or nil for C order]}.
The words of a RANDOM and the arrays of a NUMPY_GENERATOR are little endian. Its class is "Generator",
"RandomState" or "BitGenerator", its fields are those of numpy's `state`, and its *seed sequence* is
[entropy, [spawn key, ...], pool size, children spawned]. Entropy and key have at most
2^14 words of 32 bits.
*Flags* is a sum of BIG_ENDIAN, REQUIRES_GRAD, PARAMETER and COALESCED below.
The components of a TORCH_SUBCLASS are tensors of any kind under the names that its class gives them; of a
class that only relabels a plain tensor there is one, called "".

A TENSOR_FILE is a file in which tensors lie. Its map names them in the order of their bytes; its data is all
other bytes of the file, in their order, as many as size leaves. The int in front of a TENSOR says how many
of these come between it and the tensor before it. A TENSOR's layout there is nil or dimensions, never an
alias, and tells how it lies in the file, as BIG_ENDIAN tells of its numbers; so the file is the bytes before
the first tensor, that tensor as it lies in the file, and so on. *Format* and paths are text for people. Which
tensors are found in a file, and which of them are left in its data, is the writer's choice.

**Weight** decides where a tree is split. It is a function of content and grid alone:

- a value that holds no nodes (a number, text, a PATH, one key or set element as a whole, one field such as
  a type name) weighs the length of its encoding;
- a TENSOR, BLOB or FILE weighs 8, its encoded fields other than data, and its data: the encoded inline
  bytes, or `REFERENCE` per chunk named, or `REFERENCE` for a chunk list;
- a TENSOR_FILE weighs what a FILE would, and its map; an entry there weighs its path, 8, the encoded int and
  the TENSOR;
- a list, dict or other tagged node weighs 8 and what its fields, keys and children weigh, where a list or
  dict that is heavier than grid.subtree counts as `REFERENCE`.

A list or dict heavier than grid.subtree becomes a tree of its own, named by SUBTREE:

- A dict is cut into pages behind each key whose hash (BLAKE3 of its encoding), read as little-endian
  32-bit words, has word 0 divisible by grid.map_page, and behind every page of 8 * grid.map_page entries.
  While the page references weigh more than grid.subtree they are cut into pages again: at level n behind
  each page whose last key's hash has word n divisible by grid.map_page, with the same cap.
- A list is cut every grid.list_page items, or every 16 * grid.list_page if it holds nothing but
  None, bool, int and float; page references every grid.list_page.
- One page alone is the tree itself.
"""

from __future__ import annotations

from typing import Final

TUPLE: Final = 2
NAMEDTUPLE: Final = 3
SET: Final = 4
FROZENSET: Final = 5
ORDERED_DICT: Final = 6
DEFAULT_DICT: Final = 7
DEQUE: Final = 8
COMPLEX: Final = 9
BYTEARRAY: Final = 10
BLOB: Final = 11
PATH: Final = 12
DATETIME: Final = 13
DATE: Final = 14
TIME: Final = 15
TIMEDELTA: Final = 16
TIMEZONE: Final = 17
ZONEINFO: Final = 18
NAMESPACE: Final = 19
SIMPLE_NAMESPACE: Final = 20
ENUM: Final = 21
DATACLASS: Final = 22
RANGE: Final = 23
SLICE: Final = 24
ELLIPSIS: Final = 25
RANDOM: Final = 26
NUMPY_SCALAR: Final = 30
NUMPY_DTYPE: Final = 31
NUMPY_GENERATOR: Final = 32
TENSOR: Final = 40
SPARSE: Final = 41
QUANTIZED: Final = 42
TORCH_SIZE: Final = 43
TORCH_DTYPE: Final = 44
TORCH_DEVICE: Final = 45
TORCH_GENERATOR: Final = 46
COUNTER: Final = 47
TORCH_SUBCLASS: Final = 48
TORCH_CONSTANT: Final = 49
SUBTREE: Final = 60
MAP_PAGES: Final = 61
LIST_PAGES: Final = 62
ROOT: Final = 63
FILE: Final = 64
LINK: Final = 65
TENSOR_FILE: Final = 66

BIG_ENDIAN: Final = 1
"""The array's dtype was big endian; its stored bytes are little endian like all others."""
REQUIRES_GRAD: Final = 2
PARAMETER: Final = 4
"""It was a torch.nn.Parameter."""
COALESCED: Final = 8
"""A sparse COO tensor without repeated indices."""

REFERENCE: Final = 36
"""What naming another record weighs: 33 bytes in the table, the position in the body."""

MAX_DEPTH: Final = 100
"""Containers within containers in a state."""

MAX_VALUES: Final = 1 << 23
"""Values in a state, keys that are no text included; and files and folders in a commit."""

MAX_LEVEL: Final = 7
"""Highest level of pages: a hash has eight words."""
