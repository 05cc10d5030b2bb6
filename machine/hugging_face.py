"""Names on the Hugging Face Hub, and what its errors mean."""

import re

SCHEME = "hf://"


def describe_error(error: Exception) -> str:
    """Describe an error of the hub in one line, without URLs and request ids."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {401: "no such repository, or it is private: HF_TOKEN or `hf auth login` opens it", 404: "no such thing"}
    first_line = str(error).strip().split("\n")[0]
    return known.get(status or 0) or re.sub(r"\s*\(Request ID[^)]*\)", "", first_line)
