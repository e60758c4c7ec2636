"""The shipped configurations; a package so that an installed corda-vlm finds them."""
