"""Import hook that checks shapes and types of signatures in tests, with jaxtyping and beartype.

It is faster than `jaxtyping.install_import_hook`, which checks arguments twice where there is a return annotation,
opens a scope of axis sizes for functions without shapes too, wraps nested functions at each call of the outer one, and
compiles libraries from source where a checked module imports them first.
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

SIZES = jaxtyped("context")  # scope of named axis sizes; each call has its own


def checked(function):
    """Check a function's arguments and result against its annotations; axes of one name must have one size."""
    hints = {name: resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    if inspect.isgeneratorfunction(function):  # of a generator the arguments are checked, not what it yields
        return jaxtyped(function, typechecker=beartype)
    annotations, function.__annotations__ = function.__annotations__, hints
    checked_function = beartype(function)
    function.__annotations__ = checked_function.__annotations__ = annotations
    if not any(map(has_shape, hints.values())):
        return checked_function

    @wraps(function)
    def in_own_scope(*args, **kwargs):
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with SIZES:
            return checked_function(*args, **kwargs)

    return in_own_scope


def checked_class(cls):
    """Decorate a dataclass so that its fields must match their annotations when it is created."""
    if "__dataclass_fields__" in vars(cls) and "__init__" in vars(cls):
        cls.__init__ = checked(cls.__init__)
    return cls


def resolved(hint, names):
    """Evaluate an annotation that may be a string; Any where it names an import that only type checkers see."""

    def function(value: hint): ...

    try:
        return get_type_hints(function, names, include_extras=True)["value"]
    except Exception:  # evaluating an annotation may raise anything
        return Any


def has_shape(hint):
    """Whether an annotation has a jaxtyping shape in it."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))


class Checking(ast.NodeTransformer):
    """Decorate the functions, classes and methods of a module, but not functions within functions."""

    def visit_FunctionDef(self, node):
        node.decorator_list.append(decorator("checked", node))
        return node

    def visit_ClassDef(self, node):
        node.decorator_list.insert(0, decorator("checked_class", node))
        return self.generic_visit(node)


def decorator(name, node):
    """Expression of a decorator of this module, at the place of a node."""
    expression = ast.parse(f"__import__({__name__!r}).{name}", mode="eval").body
    for part in ast.walk(expression):
        ast.copy_location(part, node)
    return expression


class Loader(SourceFileLoader):
    """Loads modules with checked signatures."""

    def source_to_code(self, data, path, *, _optimize=-1):
        tree = compile(decode_source(data), path, "exec", ast.PyCF_ONLY_AST, dont_inherit=True, optimize=_optimize)
        return compile(Checking().visit(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname):
        """Cache compiled modules under names of their own, apart from those without checks."""
        own_name = partial(cache_from_source, optimization="checked1")
        with patch("importlib._bootstrap_external.cache_from_source", own_name):
            return super().get_code(fullname)


class Finder(MetaPathFinder):
    """Finds the modules of these packages with a loader that checks them."""

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
    """Check the signatures of all modules of these packages that are imported from here on."""
    sys.meta_path.insert(0, Finder(packages))
