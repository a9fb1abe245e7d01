#!/bin/sh
# Builds runs/peers/recbole, the environment in which RecBole 1.2.1 still runs, for `kd recsys bench train`.
# Its wheels predate NumPy 2, SciPy 1.13 (which removed dok_matrix._update) and setuptools 80 (pkg_resources).
set -eu
cd "$(dirname "$0")/../.."
environment=runs/peers/recbole
test -x "$environment/bin/python" || "${PYTHON:-python3}" -m venv "$environment"
pip="$environment/bin/python -m pip install --quiet --disable-pip-version-check"
$pip "setuptools<80" wheel
$pip "torch==2.13.0" "numpy==1.26.*" "scipy<1.13" "pandas<2.3" "setuptools<80"
$pip "recbole==1.2.1" "torch==2.13.0" "numpy==1.26.*" "scipy<1.13" "pandas<2.3" "setuptools<80"
"$environment/bin/python" -c "import recbole, torch; print('RecBole', recbole.__version__, 'torch', torch.__version__)"
