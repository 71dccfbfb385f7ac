# Of the base model; the instruct models of this size have --norm-epsilon 1e-6.
MODEL_ARGS=(
   --swiglu
   --num-layers 64
   --hidden-size 5120
   --ffn-hidden-size 27648
   --num-attention-heads 40
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --add-qkv-bias
   --disable-bias-linear
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --vocab-size 152064
   --untie-embeddings-and-output-weights
)
