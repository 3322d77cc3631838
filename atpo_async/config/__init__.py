"""Configuration of a run: its schema, its rules, its files and its options."""

from atpo_async.config.files import as_options, build, laid, load, read_tables, recipe_of, resolved, to_toml
from atpo_async.config.options import get, parse_value, put, split_options, unknown_option
from atpo_async.config.schema import Config, fields
from atpo_async.config.sections.data import StalenessConfig
from atpo_async.config.sections.generation import SearchConfig, TeamConfig
from atpo_async.config.sections.learning import (
    CorrectionConfig,
    CreditConfig,
    LearnerConfig,
    LoraConfig,
    ObjectiveConfig,
)
from atpo_async.config.sections.run import SupervisorConfig
from atpo_async.config.sections.transport import LinksConfig, WeightsConfig
from atpo_async.config.staleness import STALENESS_KNOBS, derived_bounds

__all__ = [
    "STALENESS_KNOBS",
    "Config",
    "CorrectionConfig",
    "CreditConfig",
    "LearnerConfig",
    "LinksConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "SearchConfig",
    "StalenessConfig",
    "SupervisorConfig",
    "TeamConfig",
    "WeightsConfig",
    "as_options",
    "build",
    "derived_bounds",
    "fields",
    "get",
    "laid",
    "load",
    "parse_value",
    "put",
    "read_tables",
    "recipe_of",
    "resolved",
    "split_options",
    "to_toml",
    "unknown_option",
]
