"""Names of rows and matchings: those of the field, and what the former ones became."""

RENAMED = {
    "dual": "mudsc",
    "zip": "zipit",
    "zip_prefix": "zipit_prefix",
    "cca": "cca_merge",
    "transport": "ot_fusion",
    "transport_weights": "ot_fusion_weights",
    "sinkhorn": "ot_fusion_sinkhorn",
    "dual_pleas": "mudsc_pleas",
    "zip_pleas": "zipit_pleas",
    "cca_pleas": "cca_merge_pleas",
    "transport_pleas": "ot_fusion_pleas",
    "dual_progressive": "mudsc_progressive",
    "zip_progressive": "zipit_progressive",
    "cca_progressive": "cca_merge_progressive",
    "transport_progressive": "ot_fusion_progressive",
}


def present(name: str) -> str:
    """What a row or a matching is called now."""
    return RENAMED.get(name, name)


def now_called(key: str, kind: str, name: str) -> str | None:
    """What to say of a former name found at ``key``; None of any other. kind: row or matching."""
    return f"{key}: this {kind} is now called {RENAMED[name]}" if name in RENAMED else None
