"""Tests that need a browser run where this folder is named, as `make browser-test` does, and not with the others."""


def pytest_ignore_collect(collection_path, config):
    is_named = any("browser" in str(argument) for argument in config.invocation_params.args)
    return None if is_named else True
