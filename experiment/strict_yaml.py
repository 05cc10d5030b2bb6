"""YAML that says each thing once, and whose aliases do not unfold without end."""

from typing import Any

import yaml

MOST_VALUES = 100_000


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, and aliases that unfold into more than `MOST_VALUES` values."""

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
        return super().construct_mapping(node, deep)
