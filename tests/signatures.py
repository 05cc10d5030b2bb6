"""How shapes and types of signatures are checked in tests."""

from beartype import beartype


def checked(function):
    """All but functions in functions, which no caller sees and which would be compiled anew at each call of the outer
    one."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
