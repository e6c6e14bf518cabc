# Sourced by .ci/run and sanitizers.sh: the tests of the ops, which run again under each instruction set with torch held
# to another, and under sanitizers. To rename a test file, or to add one, change this list alone.
op_tests=(tests/test_{ops,layer_norm,gelu,matmul,attention,lm_loss,bfloat16,arguments}.py)
