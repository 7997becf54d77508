"""Types, attributes and sizes of graph text."""

from __future__ import annotations

from typing import Any

from dfc.errors import did_you_mean
from dfc.ir.expr import FUNCTIONS, Expr, Scalar, call, symbol
from dfc.ir.tree import Opaque
from dfc.ir.types import BOOL, DTYPES, FLOAT, INT, NONE, TensorType, Type
from dfc.lang.graph_tokens import MAX_DIGITS, GraphTokens

MAX_RANK = 32
MAX_NAME = 256
MAX_TERMS = 256  # of one size: a product of sums grows beyond all bounds

SCALARS: dict[str, Type] = {"int": INT, "float": FLOAT, "bool": BOOL, "none": NONE}
_NUMBERS = {"inf": float("inf"), "nan": float("nan")}
CONSTANTS: dict[str, Any] = {"None": None, "True": True, "False": False, **_NUMBERS}
OPERATORS = ("+", "-", "*", "//", "%")


class GraphTypes(GraphTokens):
    """Reads what may stand in a type, in an attribute or as a size."""

    def __init__(self, text: str, filename: str) -> None:
        super().__init__(text, filename)
        self.types: dict[str, TensorType] = {}

    def type(self) -> Type:
        word = self.words[self.i]
        if self.kinds[self.i] == "type":
            known = self.types.get(word)
            if known is None:
                known = self.types[word] = self.tensor_type(word)
            self.i += 1
            return known
        if word in SCALARS:
            self.i += 1
            return SCALARS[word]
        self.expected("a type such as `f32[2, B]`")

    def tensor_type(self, word: str) -> TensorType:
        name, _, inside = word.partition("[")
        dtype = DTYPES.get(name)
        if dtype is None:
            self.fail_here(
                f"unknown element type `{name}`", "P003", did_you_mean(name, list(DTYPES))
            )
        kinds: list[str] = []
        words: list[str] = []
        starts: list[int] = []
        self._tokenize(inside[:-1], kinds, words, starts, self.starts[self.i] + len(name) + 1)
        saved = self.kinds, self.words, self.starts, self.i
        end = saved[2][saved[3]] + len(word) - 1
        self.kinds, self.words, self.starts = [*kinds, "end"], [*words, "]"], [*starts, end]
        self.i = 0
        shape: list[Any] = []
        while self.kinds[self.i] != "end":
            at = self.i
            size = self.expression()
            if isinstance(size, (float, bool)) or (isinstance(size, int) and size < 0):
                self.i = at
                self.fail_here(f"a size cannot be {size}", "P003")
            shape.append(size)
            if not self.accept(",") and self.kinds[self.i] != "end":
                self.expected("`,` or `]`")
        if len(shape) > MAX_RANK:
            self.fail_here(
                f"a tensor may have {MAX_RANK} dimensions, this has {len(shape)}", "P007"
            )
        self.kinds, self.words, self.starts, self.i = saved
        return TensorType(dtype, tuple(shape))

    def attribute(self) -> Any:
        kind, word = self.kinds[self.i], self.words[self.i]
        following = self.words[self.i + 1]
        if following in (",", ")", "]", "}") or kind == "string":
            self.i += 1
            if kind == "number":
                return self.number(word)
            if kind == "string":
                return self.unquote(word)
            if kind == "name":
                if word in CONSTANTS:
                    return CONSTANTS[word]
                return DTYPES[word] if word in DTYPES else self.size_symbol(word)
            self.i -= 1
        if kind == "punct" and word == "[":
            self.enter()
            self.i += 1
            items = []
            while not self.accept("]"):
                items.append(self.attribute())
                if not self.accept(","):
                    self.need("]")
                    break
            self.depth -= 1
            return tuple(items)
        if kind == "name" and following == "(" and word in ("complex", "opaque"):
            self.i += 2
            if word == "opaque":
                value: Any = Opaque(self.string())
            else:
                real = self.expression()
                self.need(",")
                imaginary = self.expression()
                if isinstance(real, Expr) or isinstance(imaginary, Expr):
                    self.fail_here("a complex number is made of two numbers", "P008")
                value = complex(float(real), float(imaginary))
            self.need(")")
            return value
        if word in ("None", *DTYPES) and following not in OPERATORS:
            self.i += 1
            return DTYPES.get(word)
        return self.expression()

    def size_symbol(self, word: str) -> Expr:
        if "." in word:
            self.i -= 1
            self.expected("a value")
        if len(word) > MAX_NAME:
            self.i -= 1
            self.fail_here(f"a name may have {MAX_NAME} characters", "P007")
        return symbol(word)

    def number(self, word: str) -> int | float:
        if word.isdigit():
            if len(word) > MAX_DIGITS:
                self.i -= 1
                self.fail_here(f"an integer may have {MAX_DIGITS} digits", "P007")
            return int(word)
        return float(word)

    def expression(self) -> Scalar:
        """sum := product (('+'|'-') product)*"""
        self.enter()
        at = self.i
        total: Any = self.product()
        while self.words[self.i] in ("+", "-") and self.kinds[self.i] == "punct":
            minus = self.words[self.i] == "-"
            self.i += 1
            right: Any = self.product()
            self.integers(at, total, right)
            total = total - right if minus else total + right
        self.depth -= 1
        result: Scalar = total
        return result

    def product(self) -> Any:
        at = self.i
        total: Any = self.factor()
        while self.words[self.i] in ("*", "//", "%") and self.kinds[self.i] == "punct":
            sign = self.words[self.i]
            self.i += 1
            right: Any = self.factor()
            self.integers(at, total, right)
            if sign == "*":
                total = total * right
                if isinstance(total, Expr) and len(total.terms) > MAX_TERMS:
                    self.fail_here(f"a size may have {MAX_TERMS} terms", "P007")
            elif right == 0:
                self.i -= 1
                self.fail_here("division by zero", "P008")
            else:
                total = call("floordiv" if sign == "//" else "mod", total, right)
        return total

    def integers(self, at: int, *operands: Any) -> None:
        for x in operands:
            if isinstance(x, (float, bool)) or (isinstance(x, Expr) and x.kind != "int"):
                self.i = at
                self.fail_here("`+ - * // %` are for integers; floats use `fadd`, `fmul`", "P008")

    def factor(self) -> Any:
        if self.accept("-"):
            self.enter()
            at = self.i
            inner = self.factor()
            self.depth -= 1
            if not isinstance(inner, float):
                self.integers(at, inner)
            return -inner
        if self.accept("("):
            inner = self.expression()
            self.need(")")
            return inner
        kind, word = self.kinds[self.i], self.words[self.i]
        if kind == "number":
            self.i += 1
            return self.number(word)
        if kind == "name" and self.words[self.i + 1] == "(":
            return self.function(word)
        if word == "None" or word in DTYPES:
            self.fail_here(f"`{word}` is not a number", "P008")
        if kind == "name":
            self.i += 1
            return CONSTANTS[word] if word in CONSTANTS else self.size_symbol(word)
        self.expected("a number or a size")

    def function(self, word: str) -> Scalar:
        if word not in FUNCTIONS:
            self.fail_here(
                f"unknown function `{word}`", "P004", did_you_mean(word, list(FUNCTIONS))
            )
        at = self.i
        self.i += 2
        args = []
        while not self.accept(")"):
            args.append(self.expression())
            if not self.accept(","):
                self.need(")")
                break
        try:
            return call(word, *args)
        except (TypeError, ValueError, ArithmeticError) as e:
            self.i = at
            self.fail_here(f"`{word}` cannot take these arguments: {e}", "P008")
