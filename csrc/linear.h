// Matrix products of any size, from the same microkernel as attention: gpt.py's linear and its backward.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x        (dbias = sum of dy's rows)
//
// All three are C = A B with A or B read across its lines, so one function serves them. Nothing is saved for the
// backward but x and W, and, where gelu follows at once, y: its own backward (gelu.h) turns dgelu into dy first.
//
//            NC columns, in panels of NR = NV * VL          C is cut into blocks of MC x NC; a block is a task, with one
//          +------+------+------+------+                    owner. For every KC terms of the sum
//     KC   | B    | NR   |      |      |                      the owner copies its rows of A into strips of MR rows,
//          +------+------+------+------+                        which stay in the second-level cache, and
//   A      +------+------+------+------+                      for each panel of NR columns
//  MR [--> | C    | tile |      |      |  MC                    copies the panel of B, and
//     [    |      |      |      |      |  rows                  runs down the strips: one tile of C each.
//   KC     +------+------+------+------+
//
// In both copies the values lie in the order in which the microkernel meets them, so it reads memory in one piece, from
// front to back. Bias and gelu are applied to a tile when its last terms arrive, while it is in the first-level cache.
//
// Names and order of the loops are those of BLIS. Each sum runs in one order, KC terms at a time, whatever the blocks
// are, so the bits do not depend on the number of threads.

// Blocks: as large as caches allow, since each block packs its rows of A and columns of B anew; as many as keep all
// threads busy. Cutting columns packs A once more, cutting rows packs B once more: whichever is smaller is done.
template <class Engine> struct Blocks {
    long MC, NC, down, across;

    Blocks(long M, long N, int workers) {
        const auto cut = [](long size, long parts, long unit) {
            return parts ? ((size + parts - 1) / parts + unit - 1) / unit * unit : unit;
        };
        long rows = (M + Engine::most_rows - 1) / Engine::most_rows;
        long columns = (N + Engine::most_columns - 1) / Engine::most_columns;
        for (;; M * columns < N * rows ? columns++ : rows++) {
            MC = cut(M, rows, Engine::row_unit), NC = cut(N, columns, Engine::NR);
            down = (M + MC - 1) / MC, across = (N + NC - 1) / NC;
            const long tasks = down * across;
            if (tasks % workers == 0 || tasks >= 4 * workers || (MC < 128 && NC < 128)) break;
        }
    }
};

// What a product is made with: how A and B are packed, and how one tile of sums comes of them. This is the microkernel;
// amx.h has another. A pack function says whether its engine can take the values at all.
template <class T> struct Fma {
    static constexpr long MR = FASTGPT_MR, NR = NV * VL<T>, KC = 256;
    static constexpr long most_rows = 512, most_columns = 1536, row_unit = MR > VL<T> ? MR : VL<T>;

    // In values of T.
    static FASTGPT_INLINE long strip_size(long kc) { return MR * kc; }
    static FASTGPT_INLINE long panel_size(long kc) { return NR * kc; }
    static FASTGPT_INLINE bool fits(long width, long) { return width % VL<T> == 0; } // in C without a buffer
    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    // Rows m0 .. m0 + mc - 1 of A, terms k0 .. k0 + kc - 1.
    static FASTGPT_NOINLINE bool pack_strips(const Product<T>& p, long m0, long mc, long k0, long kc, T* to) {
        if (p.A_transposed)
            strips_from_terms<T>(mc, kc, [&](long k) FASTGPT_LAMBDA { return p.A[k0 + k] + m0; }, to, MR * kc);
        else strips_from_rows<T>(mc, kc, [&](long m) FASTGPT_LAMBDA { return p.A[m0 + m] + k0; }, to, MR * kc);
        return true;
    }

    // to[k * NR + j] = element (k0 + k, n0 + j), k < kc, j < width; zero up to a whole register.
    static FASTGPT_NOINLINE bool pack_panel(const Product<T>& p, long k0, long kc, long n0, long width, T* to) {
        if (p.B_transposed) { // lines of B are columns of the panel
            for_columns<T>(
                width, kc, [&](long j) FASTGPT_LAMBDA { return p.B[n0 + j] + k0; },
                [&](long k, long j, vec<T> v) FASTGPT_LAMBDA { store(to + k * NR + j, v); });
            return true;
        }
        for (long k = 0; k < kc; k++, to += NR) {
            const T* from = p.B[k0 + k] + n0;
            for_channels<T>(width, [&](long j, int n) FASTGPT_LAMBDA { store(to + j, load_first(from + j, n)); });
        }
        return true;
    }

    static FASTGPT_INLINE void tile(long kc, const T* strip, const T* panel, long width, T* to, long line, bool add) {
        const int vectors = int((width + VL<T> - 1) / VL<T>);
        const StripsOf<T> a{strip, MR * kc};
        if (add) panel_product<T, true>(int(MR), vectors, kc, a, panel, NR, to, line);
        else panel_product<T, false>(int(MR), vectors, kc, a, panel, NR, to, line);
    }
};

template <class T> struct EngineFor {
    using type = Fma<T>;
};
#ifdef FASTGPT_AMX
template <> struct EngineFor<float> {
    using type = Amx;
};
#endif

// The last step of a tile at C[at]: bias, and gelu where it follows.
template <class T> FASTGPT_INLINE void finish_tile(const Product<T>& p, long at, long n0, long rows, long width) {
    for (long i = 0; i < rows; i++, at += p.N)
        for_channels<T>(width, [&](long j, int n) FASTGPT_LAMBDA {
            vec<T> y = load_first(p.C + at + j, n);
            if (p.bias) y += load_first(p.bias + n0 + j, n);
            if (p.activated != p.C) store_first(p.C + at + j, y, n);
            if (p.activated) store_first(p.activated + at + j, y * Gate<T>(y).open, n);
        });
}

// Terms k0 .. k0 + kc - 1 of one block. -> false, with nothing done, if the engine can't take the values of A.
template <class Engine, class T>
FASTGPT_NOINLINE bool add_terms(const Product<T>& p, long m0, long m_end, long n0, long n_end, long k0, long kc,
                                T* memory) {
    constexpr long MR = Engine::MR, NR = Engine::NR;
    const bool first = k0 == 0 && !p.add, last = k0 + kc >= p.K;
    T *panel = memory, *sums = panel + Engine::panel_size(kc), *strips = sums + MR * NR;
    T* rest = strips + (m_end - m0 + Engine::row_unit) / MR * Engine::strip_size(kc);
    if (!Engine::pack_strips(p, m0, m_end - m0, k0, kc, strips)) return false;
    for (long n = n0; n < n_end; n += NR) {
        const long width = n_end - n < NR ? n_end - n : NR;
        if (!Engine::pack_panel(p, k0, kc, n, width, panel)) {
            if constexpr (!std::is_same<Engine, Fma<T>>::value) // which takes everything
                add_terms<Fma<T>>(p, m0, m_end, n, n + width, k0, kc, rest);
            continue;
        }
        for (long m = m0; m < m_end; m += MR) {
            const T* strip = strips + (m - m0) / MR * Engine::strip_size(kc);
            const long rows = m_end - m < MR ? m_end - m : MR;
            T* c = p.C + m * p.N + n;
            if (rows == MR && Engine::fits(width, p.N))
                Engine::tile(kc, strip, panel, width, c, p.N, !first);
            else {
                Engine::tile(kc, strip, panel, width, sums, NR, false);
                for (long i = 0; i < rows; i++)
                    for_channels<T>(width, [&](long j, int w) FASTGPT_LAMBDA {
                        T* to = c + i * p.N + j;
                        const vec<T> v = load(sums + i * NR + j);
                        store_first(to, first ? v : load_first(to, w) + v, w);
                    });
            }
            if (last && (p.bias || p.activated)) finish_tile(p, m * p.N + n, n, rows, width);
        }
    }
    return true;
}

template <class T> void matmul(const Product<T>& p) {
    using Engine = typename EngineFor<T>::type;
    const int workers = num_threads();
    const Blocks<Engine> blocks(p.M, p.N, workers);
    const auto memory = [&](auto engine) {
        using E = decltype(engine);
        return E::panel_size(Engine::KC) + E::MR * E::NR +
               (blocks.MC + E::row_unit) / E::MR * E::strip_size(Engine::KC);
    };
    Scratch<T> scratch(workers, memory(Engine()) + (std::is_same<Engine, Fma<T>>::value ? 0 : memory(Fma<T>())));
    parallel_tasks(blocks.down * blocks.across, workers, [&](int64_t task, int worker) {
        const long m0 = task / blocks.across * blocks.MC, n0 = task % blocks.across * blocks.NC;
        const long m_end = p.M - m0 < blocks.MC ? p.M : m0 + blocks.MC;
        const long n_end = p.N - n0 < blocks.NC ? p.N : n0 + blocks.NC;
        Engine::begin();
        for (long k0 = 0; k0 == 0 || k0 < p.K; k0 += Engine::KC) {
            const long kc = p.K - k0 < Engine::KC ? p.K - k0 : Engine::KC;
            if (!add_terms<Engine>(p, m0, m_end, n0, n_end, k0, kc, scratch.part(worker)))
                add_terms<Fma<T>>(p, m0, m_end, n0, n_end, k0, kc, scratch.part(worker));
        }
        Engine::end();
    });
}
