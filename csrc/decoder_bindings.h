// fastgpt._kernels.Decoder: checks what decoder.py passes, and calls decoder.h without the interpreter lock. Included
// by bindings.cpp alone.

Packing packing_named(const string& name) {
    const char* names[] = {"float32", "bfloat16", "int8", "int4"};
    for (int i = 0; i < 4; i++)
        if (name == names[i]) return Packing(i);
    throw py::value_error("Decoder: dtype is '" + name + "', expected float32, bfloat16, int8 or int4");
}

py::ssize_t packed_bytes(const string& dtype, int64_t N, int64_t K) {
    return kernels->decoder.packed_bytes(packing_named(dtype), N, K);
}

void pack(const py::array& weight, const string& dtype, const py::array& out) {
    Arguments<float>{"pack"}.expect_rank("weight", weight, 2, "(N, K)");
    const int64_t N = weight.shape(0), K = weight.shape(1);
    const float* w = Arguments<float>{"pack"}.input("weight", weight, {N, K});
    char* to = reinterpret_cast<char*>(Arguments<uint8_t>{"pack"}.output("out", out, {packed_bytes(dtype, N, K)}));
    compute([&] { kernels->decoder.pack(w, packing_named(dtype), N, K, to); });
}

void unpack(const py::array& packed, const string& dtype, const py::array& out) {
    Arguments<float>{"unpack"}.expect_rank("out", out, 2, "(N, K)");
    const int64_t N = out.shape(0), K = out.shape(1);
    float* to = Arguments<float>{"unpack"}.output("out", out, {N, K});
    const uint8_t* data = Arguments<uint8_t>{"unpack"}.input("packed", packed, {packed_bytes(dtype, N, K)});
    compute([&] {
        kernels->decoder.unpack({packing_named(dtype), N, K, reinterpret_cast<const char*>(data), nullptr}, to);
    });
}

// A model's packed weights, held by the NumPy arrays that they came in.
class Decoder {
  public:
    Decoder(int64_t n_layer, int64_t n_head, int64_t n_embd, int64_t block_size, int64_t vocab_size,
            const string& dtype, const string& head_dtype, const py::list& tensors, bool fast_prompts)
        : tensors_(tensors), block_size_(block_size), layers_(size_t(n_layer)) {
        if (n_layer < 1 || n_head < 1 || n_embd < 1 || n_embd % n_head || block_size < 1 || vocab_size < 1)
            throw py::value_error("Decoder: sizes " + spell({n_layer, n_head, n_embd, block_size, vocab_size}) +
                                  ", expected GPT-2's: positive, n_embd a multiple of n_head");
        if (py::ssize_t(tensors.size()) != 4 + 12 * n_layer)
            throw py::value_error("Decoder: " + std::to_string(tensors.size()) + " tensors, expected " +
                                  std::to_string(4 + 12 * n_layer));
        const Packing packing = packing_named(dtype);
        const int64_t C = n_embd, D = C / n_head, padded = (C + 15) / 16 * 16;
        model_ = {n_layer, C, n_head, vocab_size, {}, nullptr, layers_.data(), nullptr, nullptr, fast_prompts};
        model_.wte = matrix(packing_named(head_dtype), vocab_size, C, false);
        model_.wpe = values({block_size, padded});
        for (DecoderLayer& layer : layers_) {
            layer.ln_1_weight = values({padded}), layer.ln_1_bias = values({padded});
            layer.c_attn = matrix(packing, n_head * ((3 * D + 15) / 16 * 16), C);
            layer.c_proj = matrix(packing, C, C);
            layer.ln_2_weight = values({padded}), layer.ln_2_bias = values({padded});
            layer.c_fc = matrix(packing, 4 * C, C);
            layer.mlp_c_proj = matrix(packing, C, 4 * C);
        }
        model_.ln_f_weight = values({padded}), model_.ln_f_bias = values({padded});
    }

    py::ssize_t cache_bytes(const string& dtype, int64_t capacity) const {
        return kernels->decoder.cache_bytes(model_, {cache_packing(dtype), 1, capacity, nullptr});
    }

    // logits (n, V) of n tokens, each at its position in its slot of the cache.
    void decode(const py::array& ids, const py::array& slots, const py::array& positions, const py::array& cache,
                const string& cache_dtype, int64_t capacity, const py::array& logits) const {
        Arguments<float>{"Decoder"}.expect_rank("ids", ids, 1, "(n,)");
        const int64_t n = ids.shape(0);
        const int64_t* id = Arguments<int64_t>{"Decoder"}.input("ids", ids, {n});
        const int64_t* slot = Arguments<int64_t>{"Decoder"}.input("slots", slots, {n});
        const int64_t* position = Arguments<int64_t>{"Decoder"}.input("positions", positions, {n});
        const DecoderCache kv = cache_in(cache, cache_dtype, capacity);
        float* to = Arguments<float>{"Decoder"}.output("logits", logits, {n, model_.V});
        std::vector<DecoderToken> list;
        for (int64_t i = 0; i < n; i++) {
            expect_in("ids", id[i], model_.V);
            expect_in("slots", slot[i], kv.slots);
            expect_in("positions", position[i], std::min(capacity, block_size_));
            list.push_back({id[i], slot[i], position[i]});
        }
        if (n) compute([&] { kernels->decoder.decode(model_, kv, list.data(), n, to); });
    }

    // Prompts one after the other in ids, `lengths` int64_t each, into `slots` of the cache: logits (n, V) of their
    // last tokens, or (len(ids), V) of all.
    void prefill(const py::array& ids, const py::array& lengths, const py::array& slots, const py::array& cache,
                 const string& cache_dtype, int64_t capacity, const py::array& logits, bool all_logits) const {
        Arguments<float>{"Decoder"}.expect_rank("ids", ids, 1, "(M,)");
        Arguments<float>{"Decoder"}.expect_rank("lengths", lengths, 1, "(n,)");
        const int64_t M = ids.shape(0), n = lengths.shape(0);
        const int64_t* id = Arguments<int64_t>{"Decoder"}.input("ids", ids, {M});
        const int64_t* T = Arguments<int64_t>{"Decoder"}.input("lengths", lengths, {n});
        const int64_t* slot = Arguments<int64_t>{"Decoder"}.input("slots", slots, {n});
        const DecoderCache kv = cache_in(cache, cache_dtype, capacity);
        float* to = Arguments<float>{"Decoder"}.output("logits", logits, {all_logits ? M : n, model_.V});
        for (int64_t i = 0; i < M; i++) expect_in("ids", id[i], model_.V);
        std::vector<DecoderPrompt> prompts;
        int64_t at = 0;
        for (int64_t i = 0; i < n; at += T[i++]) {
            expect_in("lengths", T[i] - 1, std::min(capacity, block_size_));
            expect_in("slots", slot[i], kv.slots);
            prompts.push_back({id + at, T[i], slot[i]});
        }
        if (at != M)
            Arguments<float>{"Decoder"}.refuse("lengths", "has the sum " + std::to_string(at),
                                               std::to_string(M) + " as ids has");
        if (n) compute([&] { kernels->decoder.prefill(model_, kv, prompts.data(), n, all_logits, to); });
    }

  private:
    static Packing cache_packing(const string& dtype) {
        const Packing packing = packing_named(dtype);
        if (packing != Packing::float32 && packing != Packing::bfloat16)
            throw py::value_error("Decoder: kv_dtype is '" + dtype + "', expected float32 or bfloat16");
        return packing;
    }
    static void expect_in(const char* name, int64_t value, int64_t end) {
        if (value < 0 || value >= end)
            throw py::value_error(string("Decoder: ") + name + " has " + std::to_string(value) +
                                  ", expected 0 <= x < " + std::to_string(end));
    }
    DecoderCache cache_in(const py::array& cache, const string& dtype, int64_t capacity) const {
        if (capacity < 16 || capacity % 16)
            throw py::value_error("Decoder: capacity is " + std::to_string(capacity) + ", expected a multiple of 16");
        Arguments<float>{"Decoder"}.expect_rank("cache", cache, 2, "(slots, bytes)");
        const int64_t slots = cache.shape(0);
        char* data = reinterpret_cast<char*>(
            Arguments<uint8_t>{"Decoder"}.output("cache", cache, {slots, cache_bytes(dtype, capacity)}));
        return {cache_packing(dtype), slots, capacity, data};
    }

    py::array next() { return py::cast<py::array>(tensors_[next_++]); }
    const float* values(const Shape& shape) {
        const py::array array = next();
        return Arguments<float>{"Decoder"}.input("tensors", array, shape);
    }
    PackedMatrix matrix(Packing packing, int64_t N, int64_t K, bool has_bias = true) {
        const py::array array = next();
        const py::ssize_t bytes = kernels->decoder.packed_bytes(packing, N, K);
        const uint8_t* data = Arguments<uint8_t>{"Decoder"}.input("tensors", array, {bytes});
        const float* bias = has_bias ? values({(N + 15) / 16 * 16}) : nullptr;
        return {packing, N, K, reinterpret_cast<const char*>(data), bias};
    }

    py::list tensors_;
    size_t next_ = 0;
    int64_t block_size_;
    std::vector<DecoderLayer> layers_;
    DecoderModel model_;
};

// tokens (B) drawn from logits (B, V) with u (B); -1 where some logit is not finite.
void sample(const py::array& logits, double temperature, int64_t top_k, double top_p, const py::array& u,
            const py::array& tokens) {
    Arguments<float>{"sample"}.expect_rank("logits", logits, 2, "(B, V)");
    const int64_t B = logits.shape(0), V = logits.shape(1);
    if (V == 0)
        Arguments<float>{"sample"}.refuse("logits", "has shape " + spell(shape_of(logits)), "at least one token");
    const float* x = Arguments<float>{"sample"}.input("logits", logits, {B, V});
    const double* random = Arguments<double>{"sample"}.input("u", u, {B});
    int64_t* to = Arguments<int64_t>{"sample"}.output("tokens", tokens, {B});
    compute([&] {
        Sampler sampler(temperature, top_k, top_p);
        for (int64_t b = 0; b < B; b++) to[b] = sampler.draw(x + b * V, V, random[b]);
    });
}

void bind_decoder(py::module_& m) {
    const auto arg = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("packed_bytes", packed_bytes, py::arg("dtype"), py::arg("N"), py::arg("K"));
    m.def("pack", pack, arg("weight"), py::arg("dtype"), arg("out"),
          "A matrix in the order in which decoding reads it.");
    m.def("unpack", unpack, arg("packed"), py::arg("dtype"), arg("out"));
    m.def(
        "rounds_prompts", [](const string& dtype) { return kernels->decoder.rounds_prompts(packing_named(dtype)); },
        py::arg("dtype"), "Does the instruction set in use have products for prompts that are rounded like weights?");
    m.def("sample", sample, arg("logits"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), arg("u"),
          arg("tokens"));
    m.def(
        "use_dot_products",
        [](bool use) {
            std::swap(has_dot_products, use);
            return use;
        },
        py::arg("use"),
        "For tests: whether int4 uses the processor's instruction for it, which must be there. -> what was before");
    py::class_<Decoder>(m, "Decoder")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, const string&, const string&, const py::list&,
                      bool>(),
             py::arg("n_layer"), py::arg("n_head"), py::arg("n_embd"), py::arg("block_size"), py::arg("vocab_size"),
             py::arg("dtype"), py::arg("head_dtype"), py::arg("tensors"), py::arg("fast_prompts"))
        .def("cache_bytes", &Decoder::cache_bytes, py::arg("dtype"), py::arg("capacity"))
        .def("decode", &Decoder::decode, arg("ids"), arg("slots"), arg("positions"), arg("cache"),
             py::arg("cache_dtype"), py::arg("capacity"), arg("logits"))
        .def("prefill", &Decoder::prefill, arg("ids"), arg("lengths"), arg("slots"), arg("cache"),
             py::arg("cache_dtype"), py::arg("capacity"), arg("logits"), py::arg("all_logits"));
}
