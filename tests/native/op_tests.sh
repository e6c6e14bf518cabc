# Sourced by .ci/run and sanitizers.sh: the tests of the ops, which run again on each instruction set, beside torch's
# oldest code, and under sanitizers. To rename a test file, or to add one, change this list alone.
op_tests=(tests/test_{ops,layer_norm,gelu,matmul,attention,lm_loss,bfloat16,arguments}.py)
