"""YAML files whose values are read as texts. Nothing here imports torch."""

import yaml


class YamlTexts(yaml.BaseLoader):
    """YAML whose values are all texts, as they are written; a key that comes twice is a YAMLError."""

    def construct_mapping(self, node, deep=False):
        """The dictionary of a mapping."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice} comes twice")
        return super().construct_mapping(node, deep)
