"""Conversion between configurations and mappings, older settings included, and a strict YAML loader."""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, ClassVar, cast, get_args, get_origin, get_type_hints

import yaml


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots, as in flags: `{"optim": {"lr": 1}}` becomes `{"optim.lr": 1}`."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def from_dict(hint: Any, values: Any) -> Any:
    """Restore a configuration of type `hint` from `to_dict`, unparsed; missing settings get their defaults."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return cast(Any, hint)(**{name: from_dict(hints.get(name), value) for name, value in upgrade(values).items()})
    if get_origin(hint) is list:
        return [from_dict(get_args(hint)[0], value) for value in values]
    return tuple(values) if get_origin(hint) is tuple else values


REMOVED = {  # settings that no longer exist, and the values at which they can be ignored
    ("diffusion", "times"): ["importance"],  # only affected training
    ("sampling", "guidance_schedule"): [None, "constant"],
    ("sampling", "guidance_momentum"): [None, 0],
}


def upgrade(values: Any) -> Any:
    """Convert a configuration of an older version to the current settings.

    Drops removed settings that have no effect. `eta` (of ddim) and `churn` (of heun), once settings of `sampling` that
    were 0 for all other samplers, become sampler arguments.
    """
    if not isinstance(values, Mapping):
        return values
    groups = {name: dict(group) if isinstance(group, Mapping) else group for name, group in values.items()}
    for (name, setting), harmless in REMOVED.items():
        group = groups.get(name)
        if isinstance(group, dict) and setting in group and group[setting] in harmless:
            del group[setting]
    sampling = groups.get("sampling")
    if isinstance(sampling, dict) and not sampling.keys().isdisjoint(("eta", "churn")):
        arguments = {name: value for name in ("eta", "churn") if (value := sampling.pop(name, None))}
        sampling |= {"sampler_args": arguments} if arguments else {}
    return groups


MAX_VALUES = 100_000
NAMES = {"classes", "exclude_classes", "imports"}  # settings that are lists of names


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, and aliases that expand to more than `MAX_VALUES` values. Names in
    lists of names are always text, even 007, no, null or 1e3. Elsewhere 1e3 is a number, and dates are text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.num_values: dict[yaml.Node, int] = {}  # aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        if not alias:
            values = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for item in values for child in (item if isinstance(item, tuple) else [item])]
            self.num_values[node] = 1 + sum(self.num_values[child] for child in children)
        if self.num_values.setdefault(node, MAX_VALUES + 1) > MAX_VALUES:  # unset for a node that contains itself
            problem = f"aliases unfold into more than {MAX_VALUES} values; write out what is meant"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key, names in node.value:  # which now includes keys merged by `<<`
            if key.value.rpartition(".")[2] in NAMES and isinstance(names, yaml.SequenceNode):
                mapping[key.value] = [self.construct_scalar(name) for name in names.value]
        return mapping


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
