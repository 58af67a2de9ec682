"""The known failures of a class of tests are expected, each with its reason."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for cls in {item.cls for item in items}:
        unknown = [name for name in cls.known_failures if not hasattr(cls, name)]
        if unknown:
            raise pytest.UsageError(f"{cls.__name__}.known_failures: got {', '.join(unknown)}, want tests of the suite")
    for item in items:
        if item.name in item.cls.known_failures:
            # Strict: a test that begins to pass leaves the list.
            item.add_marker(pytest.mark.xfail(reason=item.cls.known_failures[item.name], strict=True))
