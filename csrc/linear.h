// Matrix products of any size, from the same microkernel as attention: gpt.py's linear and its backward.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x        (dbias = sum of dy's rows)
//
// All three are C = A B with A or B read across its lines, so one function serves them. Nothing is saved for the
// backward but x and W, and, where gelu follows at once, y: its own backward (gelu.h) turns dgelu into dy first.
//
//            NC columns, in panels of NR        C is cut into blocks of MC x NC; a block is a task, with one owner.
//          +------+------+------+------+        For every KC terms of the sum
//     KC   | B    |      |      |      |          the owner copies its rows of A into strips of MR rows, which stay in
//          +------+------+------+------+            the second-level cache, and
//   A      +------+------+------+------+          for each panel of NR columns
//  MR [--> | tile |      |      |      |  MC        copies that panel of B, and
//     [    |      |      |      |      |  rows      runs down the strips: one tile of C each.
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

// What a product is made with: how A and B are packed, and how one tile of sums comes of them. Here it is the
// microkernel; amx.h has another way, which can't take every value.
template <class T> struct Fma {
    static constexpr bool takes_all = true;
    static constexpr long MR = FASTGPT_MR, NR = NV * VL<T>, KC = 256;
    static constexpr long most_rows = 512, most_columns = 1536, row_unit = MR > VL<T> ? MR : VL<T>;

    // In values of T.
    static FASTGPT_INLINE long strip_size(long kc) { return MR * kc; }
    static FASTGPT_INLINE long panel_size(long kc) { return NR * kc; }
    static FASTGPT_INLINE bool fits(long width, long, bool) { return width % VL<T> == 0; } // in C without a buffer
    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    // Rows m0 .. m0 + mc - 1 of A, terms k0 .. k0 + kc - 1. taken[i]: can strip i be used?
    static FASTGPT_NOINLINE void pack_strips(const Product<T>& p, long m0, long mc, long k0, long kc, T* to, bool*) {
        if (p.A_transposed)
            strips_from_terms<T>(
                mc, kc, [&](long k) FASTGPT_LAMBDA { return p.A[k0 + k] + m0; }, to, MR * kc);
        else
            strips_from_rows<T>(
                mc, kc, [&](long m) FASTGPT_LAMBDA { return p.A[m0 + m] + k0; }, to, MR * kc);
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

#ifdef FASTGPT_AMX
template <class T> using EngineFor = std::conditional_t<std::is_same_v<T, float>, Amx, Fma<T>>;
#else
template <class T> using EngineFor = Fma<T>;
#endif

// The last step of a tile at C[at]: bias, and gelu where it follows.
template <class T> FASTGPT_INLINE void finish_tile(const Product<T>& p, long at, long n0, long rows, long width) {
    for (long i = 0; i < rows; i++, at += p.N)
        for_channels<T>(width, [&](long j, int n) FASTGPT_LAMBDA {
            vec<T> y = load_first(p.C + at + j, n);
            if (p.bias) y += load_first(p.bias + n0 + j, n);
            if (p.activated != p.C) store_first(p.C + at + j, y, n);
            if (p.activated) store_first(p.activated + at + j, y * gelu_sigmoid<T>(y), n);
        });
}

// What a task works in, for blocks of `rows` rows and `terms` terms at a time.
template <class Engine, class T> struct Workspace {
    T *panel, *sums, *strips, *rest;
    bool* taken; // strip by strip

    static long count(long rows) { return (rows + Engine::row_unit) / Engine::MR; }
    static long size(long rows, long terms) { // in values of T
        return Engine::panel_size(terms) + Engine::MR * Engine::NR + count(rows) * Engine::strip_size(terms) +
               round_up(count(rows), 64);
    }
    Workspace(T* memory, long rows, long terms)
        : panel(memory), sums(panel + Engine::panel_size(terms)), strips(sums + Engine::MR * Engine::NR),
          rest(memory + size(rows, terms)),
          taken(reinterpret_cast<bool*>(strips + count(rows) * Engine::strip_size(terms))) {}
};

// Terms k0 .. k0 + kc - 1 of one block of C. A tile that the engine can't take is left to Fma: by the values alone, not
// by the block it is in, so that the bits don't depend on the blocks.
template <class Engine, class T> FASTGPT_NOINLINE void add_terms(const Product<T>& p, long m0, long m_end, long n0,
                                                                 long n_end, long k0, long kc, T* memory) {
    constexpr long MR = Engine::MR, NR = Engine::NR;
    const bool first = k0 == 0 && !p.add, last = k0 + kc >= p.K;
    const Workspace<Engine, T> work(memory, m_end - m0, kc);
    Engine::pack_strips(p, m0, m_end - m0, k0, kc, work.strips, work.taken);
    for (long n = n0; n < n_end; n += NR) {
        const long width = n_end - n < NR ? n_end - n : NR;
        const bool panel_taken = Engine::pack_panel(p, k0, kc, n, width, work.panel);
        for (long m = m0; m < m_end; m += MR) {
            const T* strip = work.strips + (m - m0) / MR * Engine::strip_size(kc);
            const long rows = m_end - m < MR ? m_end - m : MR;
            T* c = p.C + m * p.N + n;
            if constexpr (!Engine::takes_all)
                if (!panel_taken || !work.taken[(m - m0) / MR]) {
                    add_terms<Fma<T>>(p, m, m + rows, n, n + width, k0, kc, work.rest);
                    continue;
                }
            if (p.add) // what C holds, perhaps in memory far away, is wanted right after the tile
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < width; j += 64 / long(sizeof(T))) __builtin_prefetch(c + i * p.N + j);
            if (rows == MR && Engine::fits(width, p.N, first))
                Engine::tile(kc, strip, work.panel, width, c, p.N, !first);
            else {
                Engine::tile(kc, strip, work.panel, width, work.sums, NR, false);
                for (long i = 0; i < rows; i++)
                    for_channels<T>(width, [&](long j, int w) FASTGPT_LAMBDA {
                        T* to = c + i * p.N + j;
                        const vec<T> v = load(work.sums + i * NR + j);
                        store_first(to, first ? v : load_first(to, w) + v, w);
                    });
            }
            if (last && (p.bias || p.activated)) finish_tile(p, m * p.N + n, n, rows, width);
        }
    }
}

template <class T, class Engine = EngineFor<T>> void matmul(const Product<T>& p) {
    const int workers = num_threads();
    const Blocks<Engine> blocks(p.M, p.N, workers);
    const long terms = p.K < Engine::KC ? p.K : Engine::KC; // at a time
    Scratch<T> scratch(workers, Workspace<Engine, T>::size(blocks.MC, terms) +
                                    (Engine::takes_all ? 0 : Workspace<Fma<T>, T>::size(Engine::MR, terms)));
    parallel_tasks(blocks.down * blocks.across, workers, [&](int64_t task, int worker) {
        const long m0 = task / blocks.across * blocks.MC, n0 = task % blocks.across * blocks.NC;
        const long m_end = p.M - m0 < blocks.MC ? p.M : m0 + blocks.MC;
        const long n_end = p.N - n0 < blocks.NC ? p.N : n0 + blocks.NC;
        Engine::begin();
        for (long k0 = 0; k0 == 0 || k0 < p.K; k0 += Engine::KC) {
            const long kc = p.K - k0 < Engine::KC ? p.K - k0 : Engine::KC;
            add_terms<Engine>(p, m0, m_end, n0, n_end, k0, kc, scratch.part(worker));
        }
        Engine::end();
    });
}
