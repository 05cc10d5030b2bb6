"""How shapes and types of signatures are checked in tests: jaxtyping reads them, beartype verifies them.

`jaxtyping.install_import_hook` would check arguments twice where something is returned, give functions without shapes
a scope of sizes too, build what it wraps functions in functions with at each call of the outer one, and compile the
libraries that a module is the first to import from their source.
"""

import ast
import inspect
import sys
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import cache_from_source, decode_source
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

from beartype import beartype
from jaxtyping import AbstractArray, config, jaxtyped

SIZES = jaxtyped("context")  # of axes, by name: of one call


def checked(function):
    """Arguments and what is returned are as annotated, axes of one name of one size."""
    hints = {name: resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    if inspect.isgeneratorfunction(function):  # of which what it returns is checked, not what it yields
        return jaxtyped(function, typechecker=beartype)
    annotations, function.__annotations__ = function.__annotations__, hints
    checking = beartype(function)
    function.__annotations__ = checking.__annotations__ = annotations
    if not any(map(has_shape, hints.values())):
        return checking

    @wraps(function)
    def in_own_scope(*args, **kwargs):
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with SIZES:
            return checking(*args, **kwargs)

    return in_own_scope


def checked_class(own):
    """What a dataclass is made of is as annotated."""
    if "__dataclass_fields__" in vars(own) and "__init__" in vars(own):
        own.__init__ = checked(own.__init__)
    return own


def resolved(hint, names):
    """An annotation that may be a string; Any, where it names what is imported for the type checker alone."""

    def function(value: hint): ...

    try:
        return get_type_hints(function, names, include_extras=True)["value"]
    except Exception:  # of whatever kind evaluating it raises
        return Any


def has_shape(hint):
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))


class Checking(ast.NodeTransformer):
    """Functions and classes of a module, and methods, are decorated; functions in functions, which no caller sees, are
    left as they are."""

    def visit_FunctionDef(self, node):
        node.decorator_list.append(decorator("checked", node))
        return node

    def visit_ClassDef(self, node):
        node.decorator_list.insert(0, decorator("checked_class", node))
        return self.generic_visit(node)


def decorator(name, node):
    expression = ast.parse(f"__import__({__name__!r}).{name}", mode="eval").body
    for part in ast.walk(expression):
        ast.copy_location(part, node)
    return expression


class Loader(SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = compile(decode_source(data), path, "exec", ast.PyCF_ONLY_AST, dont_inherit=True, optimize=_optimize)
        return compile(Checking().visit(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname):
        """Kept beside what is compiled without checks."""
        own = partial(cache_from_source, optimization="checked1")
        with patch("importlib._bootstrap_external.cache_from_source", own):
            return super().get_code(fullname)


class Finder(MetaPathFinder):
    """Modules of these packages are checked."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def check(packages):
    sys.meta_path.insert(0, Finder(packages))
