"""What the site of `make docs` is made of beside docs/: pages out of the code, links, diagrams, figures."""
