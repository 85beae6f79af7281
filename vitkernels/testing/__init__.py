"""What tests, benchmarks and `vitkernels verify` share: oracle, rule of accuracy, random problems, hunt for races."""
