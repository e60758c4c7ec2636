"""Which method forgets less at equal gain: methods, rates and seeds on tasks with kept tasks (``corda-vlm compare``)."""
