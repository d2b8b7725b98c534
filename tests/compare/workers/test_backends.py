import pytest

from metalr_hf.compare.workers import check_backend


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, "local", None), "workers=0 must be 1 or more"),
        ((2, "dsk", None), r"backend='dsk' is not one. Did you mean 'dask'\? There are: local, dask, ray"),
        ((2, "local", "tcp://10.0.0.1:8786"), "scheduler='tcp://10.0.0.1:8786' is for the backends dask and ray"),
        ((2, "dask", None), "backend='dask' needs scheduler"),
    ],
)
def test_bad_workers_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        check_backend(*given)
