"""The lab: a small real LLaVA to try everything on."""
