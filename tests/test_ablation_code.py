"""Which code an ablation's stages depend on, and what of it counts."""

from ablation import identity


def test_code_hashes_ignore_comments_docstrings_and_layout(tmp_path):
    def of(text):
        (tmp_path / "train.py").write_text(text)
        identity.code_hashes.cache_clear()
        return identity.code_hashes("train", tmp_path)

    base = of('"""What."""\n\n\ndef f(x):\n    """Why."""\n    return x + 1\n')
    assert of("# said differently\ndef f( x ):\n    return (x + 1)\n") == base
    assert of("def f(x):\n    return x + 2\n") != base
    identity.code_hashes.cache_clear()


def test_the_code_of_a_training_is_what_it_imports():
    files = identity.code_hashes("train").keys()
    assert files >= {"train.py", "training/objective.py", "training/batches.py", "models/layers/window.py"}
    assert files.isdisjoint({"conversion/diffusers_pipeline.py", "scripts/doctor.py", "training/log.py"})
    by_name = {"studies/cascade/cascade_diffusion.py", "studies/cascade/three_stages.py", "models/xswin.py"}
    assert files >= by_name  # by import_module, or as "module:class"
    assert identity.code_hashes("score").keys() > {*files, "metrics/reference.py", "evaluation/scoring.py"}
    assert "ablation/results.py" not in identity.code_hashes("score")
