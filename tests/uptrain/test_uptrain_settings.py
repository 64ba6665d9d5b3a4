"""Settings of uptraining."""

from __future__ import annotations

import pytest

from recursify.errors import SettingsError
from recursify.uptrain.settings import UptrainSettings


def test_settings_are_strict():
    """A misspelt key names the nearest; a number that YAML reads as text is a number."""
    assert UptrainSettings.from_mapping({"learning_rate": "3e-4"}, "here").learning_rate == 3e-4
    assert UptrainSettings.from_mapping({"lora_learning_rate": "1e-3"}, "here").lora_learning_rate == 1e-3
    assert UptrainSettings.from_mapping({"precision": "bfloat16"}, "here").precision == "bfloat16"
    with pytest.raises(SettingsError, match=r"Unknown key 'learnin_rate' in here\. Did you mean 'learning_rate'"):
        UptrainSettings.from_mapping({"learnin_rate": 1}, "here")
    with pytest.raises(SettingsError, match="learning_rate in here must be a number above 0, got 'fast'"):
        UptrainSettings.from_mapping({"learning_rate": "fast"}, "here")
    with pytest.raises(SettingsError, match="batch_size must be a whole number of at least 1, got 0"):
        UptrainSettings(batch_size=0)
    with pytest.raises(SettingsError, match="warmup_fraction must be a number of at least 0 and at most 1, got 3"):
        UptrainSettings(warmup_fraction=3)
    with pytest.raises(SettingsError, match=r"Unknown teacher_dtype 'bf16'\. Use one of: auto, float32, bfloat16"):
        UptrainSettings(teacher_dtype="bf16")
