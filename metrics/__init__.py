"""Scores of images and cost of models; knows neither models nor data.

`metrics.fidelity` scores samples against a reference (the only caller of torch-fidelity),
`metrics.classifier` trains a small extractor where none can be downloaded, `metrics.cost` counts parameters,
FLOPs and images a second. Import the module wanted: the package itself imports nothing.
"""
