"""The way from and to plain mappings, from configurations of before, and YAML that says each thing once."""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, ClassVar, cast, get_args, get_origin, get_type_hints

import yaml


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`: the spelling of flags."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def from_dict(kind: Any, values: Any) -> Any:
    """A configuration again, from `to_dict`: no value is read anew. Settings that it lacks are their defaults."""
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return cast(Any, kind)(**{name: from_dict(kinds.get(name), value) for name, value in of_today(values).items()})
    if get_origin(kind) is list:
        return [from_dict(get_args(kind)[0], value) for value in values]
    return tuple(values) if get_origin(kind) is tuple else values


FORMER = {  # settings that went, and the values at which nothing goes with them
    ("diffusion", "times"): ["importance"],  # of training alone
    ("sampling", "guidance_schedule"): [None, "constant"],
    ("sampling", "guidance_momentum"): [None, 0],
}


def of_today(values: Any) -> Any:
    """A whole configuration, as files of before have it, in the settings of today. Samplers own their arguments, where
    `sampling` had `eta` (of ddim) and `churn` (of heun), 0 for all others."""
    if not isinstance(values, Mapping):
        return values
    groups = {name: dict(group) if isinstance(group, Mapping) else group for name, group in values.items()}
    for (name, setting), harmless in FORMER.items():
        group = groups.get(name)
        if isinstance(group, dict) and setting in group and group[setting] in harmless:
            del group[setting]
    sampling = groups.get("sampling")
    if isinstance(sampling, dict) and not sampling.keys().isdisjoint(("eta", "churn")):
        arguments = {name: value for name in ("eta", "churn") if (value := sampling.pop(name, None))}
        sampling |= {"sampler_args": arguments} if arguments else {}
    return groups


MOST_VALUES = 100_000
NAMES = {"classes", "exclude_classes", "imports"}  # settings that are lists of names


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, and aliases that unfold into more than `MOST_VALUES` values. Names in lists are
    the text that they are: 007, no, null and 1e3 can be names. Elsewhere 1e3 is a number, and no text is a date."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.unfolded: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        if not alias:
            values = node.value if isinstance(node, yaml.CollectionNode) else []
            below = [child for pair in values for child in (pair if isinstance(pair, tuple) else [pair])]
            self.unfolded[node] = 1 + sum(self.unfolded[child] for child in below)
        if self.unfolded.setdefault(node, MOST_VALUES + 1) > MOST_VALUES:  # one that holds itself is unknown as yet
            problem = f"aliases unfold into more than {MOST_VALUES} values; write out what is meant"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key, names in node.value:  # those that `<<` merges among them
            if key.value.rpartition(".")[2] in NAMES and isinstance(names, yaml.SequenceNode):
                mapping[key.value] = [self.construct_scalar(name) for name in names.value]
        return mapping


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
