"""Scores of images and cost of models; knows neither models nor data.

`metrics.extractors` loads the networks that images are judged by, `metrics.features` runs images through them,
`metrics.fidelity` scores samples against a reference (these are the only callers of torch-fidelity),
`metrics.classifier` trains a small extractor where none can be downloaded, `metrics.cost` counts parameters,
FLOPs and images a second. Import the module wanted: the package itself imports nothing.
"""
