import pytest


@pytest.fixture
def assert_adds_up():
    """Assert that a metric over parts, also merged over two ranks, equals that of the whole.

    Without values it is NaN.
    """

    def check(metric, whole, *parts):
        expected = float(metric(*whole))
        metric.reset()
        for part in parts:
            metric.update(*part)
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
        one, other = metric.clone(), metric.clone()
        one.reset()
        other.reset()
        one.update(*parts[0])
        for part in parts[1:]:
            other.update(*part)
        one.merge_state(other)
        assert float(one.compute()) == pytest.approx(expected, rel=1e-5)
        metric.reset()
        with pytest.warns(UserWarning, match="before"):  # torchmetrics' own
            assert metric.compute().isnan()

    return check
