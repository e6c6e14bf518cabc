// Matrix products of any size: gpt.py's linear and its backward.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x        (dbias = sum of dy's rows)
//
// All three are C = A B with A or B transposed, so one function serves them. Nothing is saved for the backward but x
// and W, and, where gelu follows at once, y: its own backward (gelu.h) turns the gradient of gelu(y) into dy first.
//
//            NC columns, in panels of NR        C is cut into blocks of MC x NC; a C block is a task, with one owner.
//          +------+------+------+------+        For every k block, KC of the sum's depth K,
//     KC   | B    |      |      |      |          the owner packs its rows of A into micro-panels of MR rows, which
//     stay
//          +------+------+------+------+            in the second-level cache, and
//   A      +------+------+------+------+          for each panel of NR columns
//  MR [--> |MR, NR|      |      |      |  MC        packs that panel of B, and
//     [    |      |      |      |      |  rows      runs down the micro-panels: MR x NR of C each.
//   KC     +------+------+------+------+
//
// Packed values lie in the order in which they are met, so memory is read in one piece, from front to back. Bias and
// gelu are applied when the last k block arrives, while the MR x NR values are in the first-level cache.
//
// Names and order of the loops are those of BLIS. Each sum runs in one order, KC at a time, whatever the C blocks are,
// so the bits do not depend on the number of threads.
//
// What multiplies is an engine: Fma (matmul_fma.h) or AmxTiles (matmul_amx.h), each for float32 products and for those
// of operands rounded to bfloat16, which the caller chooses: the tensors are float32 all the same. An engine tells its
// MR, NR, KC and largest C block; packs A and B; and multiplies one micro-panel of A with one panel of B. One that
// can't multiply infinities and NaN says so when it packs them (packed_ok), and Fma takes its place.
//
// Compiled once per instruction set (all_kernels.h).

// The engine for T, unless the caller names another.
#ifdef FASTGPT_AMX
template <class T> using EngineFor = std::conditional_t<std::is_same_v<T, float>, Amx, Fma<T>>;
using BFloat16Engine = AmxBFloat16;
#else
template <class T> using EngineFor = Fma<T>;
#ifdef FASTGPT_BFLOAT16
using BFloat16Engine = Fma<float, Pair>;
#endif
#endif

// C blocks: as large as caches allow, since each packs its rows of A and columns of B again; as many as keep all
// threads busy. Cutting columns packs A once more, cutting rows packs B once more: whichever is smaller is done.
template <class Engine> struct Blocks {
    int64_t MC, NC, row_blocks, col_blocks;

    Blocks(int64_t M, int64_t N, int workers) {
        const auto cut = [](int64_t size, int64_t parts, int64_t unit) {
            return parts ? round_up(ceil_div(size, parts), unit) : unit;
        };
        int64_t rows = ceil_div(M, Engine::max_rows);
        int64_t columns = ceil_div(N, Engine::max_columns);
        for (;;) {
            MC = cut(M, rows, Engine::row_unit);
            NC = cut(N, columns, Engine::NR);
            row_blocks = ceil_div(M, MC);
            col_blocks = ceil_div(N, NC);
            const int64_t tasks = row_blocks * col_blocks;
            if (tasks % workers == 0 || tasks >= 4 * workers || (MC < 128 && NC < 128)) break;
            if (M * columns < N * rows) columns++;
            else rows++;
        }
    }
};

// The last step of rows x width values at C[at], column n0: bias, and gelu where it follows.
template <class T>
FASTGPT_INLINE void finish(const MatmulArgs<T>& args, int64_t at, int64_t n0, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++, at += args.N)
        for_channels<T>(width, [&](int64_t j, int n) FASTGPT_LAMBDA {
            vec<T> y = load_first(args.C + at + j, n);
            if (args.bias) y += load_first(args.bias + n0 + j, n);
            if (args.activated != args.C) store_first(args.C + at + j, y, n);
            if (args.activated) store_first(args.activated + at + j, y * gelu_sigmoid<T>(y), n);
        });
}

// What a task works in, for C blocks of `rows` rows and a depth of kc.
template <class Engine, class T> struct Workspace {
    T* packed_b;
    T* sums; // MR x NR, where C can't be stored to directly
    T* packed_a;
    bool* packed_ok; // of each micro-panel
    T* rest;         // memory past this workspace

    static int64_t panels(int64_t rows) { return (rows + Engine::row_unit) / Engine::MR; }
    static int64_t size(int64_t rows, int64_t kc) { // in values of T
        return Engine::packed_b_size(kc) + Engine::MR * Engine::NR + panels(rows) * Engine::packed_a_size(kc) +
               round_up(panels(rows), 64);
    }
    Workspace(T* memory, int64_t rows, int64_t kc)
        : packed_b(memory), sums(packed_b + Engine::packed_b_size(kc)), packed_a(sums + Engine::MR * Engine::NR),
          packed_ok(reinterpret_cast<bool*>(packed_a + panels(rows) * Engine::packed_a_size(kc))),
          rest(memory + size(rows, kc)) {}
};

// Fetches the panel of B that is packed next, a share of its lines for each micro-panel that is multiplied meanwhile:
// B of the head lies in memory, far away. A B that the third-level cache may hold is not worth the instructions; one of
// rank 0 is a single row, or packed already (strips.h).
template <class T> class NextPanel {
  public:
    NextPanel(const MatmulArgs<T>& args, int64_t n, int64_t width, int64_t k0, int64_t kc, int64_t shares)
        : B(args.B), row(args.B_transposed ? n : k0), column(args.B_transposed ? k0 : n),
          values(args.B_transposed ? kc : width) {
        const int64_t rows = args.B_transposed ? width : kc;
        const bool far = args.B.rank > 0 && args.N * args.K * int64_t(sizeof(T)) > int64_t(64) << 20;
        end = row + (far && width > 0 ? rows : 0);
        share = ceil_div(rows, shares);
    }
    FASTGPT_INLINE void fetch_share() {
        for (const int64_t stop = min(row + share, end); row < stop; row++)
            for (int64_t i = 0; i < values; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(B[row] + column + i);
    }

  private:
    const Rows<const T>& B;
    int64_t row, column, values, end, share;
};

// One k block, k0 .. k0 + kc - 1, of one C block. What the engine can't multiply is left to Fma: by the values alone,
// not by the C block they are in, so that the bits don't depend on the blocks.
template <class Engine, class T> FASTGPT_NOINLINE void add_k_block(const MatmulArgs<T>& args, int64_t m0, int64_t m_end,
                                                                   int64_t n0, int64_t n_end, int64_t k0, int64_t kc,
                                                                   T* memory) {
    constexpr int64_t MR = Engine::MR, NR = Engine::NR;
    const bool first = k0 == 0 && !args.accumulate;
    const bool last = k0 + kc >= args.K;
    const Workspace<Engine, T> work(memory, m_end - m0, kc);
    Engine::pack_a(args, m0, m_end - m0, k0, kc, work.packed_a, work.packed_ok);
    for (int64_t n = n0; n < n_end; n += NR) {
        const int64_t width = min(n_end - n, NR);
        const bool packed_b_ok = Engine::pack_b(args, k0, kc, n, width, work.packed_b);
        NextPanel<T> next(args, n + width, min(n_end - n - width, NR), k0, kc, ceil_div(m_end - m0, MR));
        for (int64_t m = m0; m < m_end; m += MR) {
            next.fetch_share();
            const T* packed_a = work.packed_a + (m - m0) / MR * Engine::packed_a_size(kc);
            const int64_t rows = min(m_end - m, MR);
            T* C = args.C + m * args.N + n;
            if constexpr (!Engine::handles_nonfinite)
                if (!packed_b_ok || !work.packed_ok[(m - m0) / MR]) {
                    add_k_block<typename Engine::Fallback>(args, m, m + rows, n, n + width, k0, kc, work.rest);
                    continue;
                }
            if (args.accumulate) // what C holds, perhaps in memory far away, is wanted right after the product
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < width; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(C + i * args.N + j);
            if (rows == MR && Engine::stores_directly(width, args.N, first))
                Engine::multiply(kc, packed_a, work.packed_b, width, C, args.N, !first);
            else {
                Engine::multiply(kc, packed_a, work.packed_b, width, work.sums, NR, false);
                for (int64_t i = 0; i < rows; i++)
                    for_channels<T>(width, [&](int64_t j, int lanes) FASTGPT_LAMBDA {
                        T* to = C + i * args.N + j;
                        const vec<T> v = load(work.sums + i * NR + j);
                        store_first(to, first ? v : load_first(to, lanes) + v, lanes);
                    });
            }
            if (last && (args.bias || args.activated)) finish(args, m * args.N + n, n, rows, width);
        }
    }
}

template <class T, class Engine = EngineFor<T>> void matmul(const MatmulArgs<T>& args) {
    const int workers = num_threads();
    const Blocks<Engine> blocks(args.M, args.N, workers);
    const int64_t depth = min(args.K, Engine::KC);
    Scratch<T> scratch(workers, Workspace<Engine, T>::size(blocks.MC, depth) +
                                    (Engine::handles_nonfinite ? 0 : Workspace<Fma<T>, T>::size(Engine::MR, depth)));
    parallel_tasks(blocks.row_blocks * blocks.col_blocks, workers, [&](int64_t task, int worker) {
        const int64_t m0 = task / blocks.col_blocks * blocks.MC;
        const int64_t n0 = task % blocks.col_blocks * blocks.NC;
        const int64_t m_end = min(args.M, m0 + blocks.MC);
        const int64_t n_end = min(args.N, n0 + blocks.NC);
        Engine::begin();
        for (int64_t k0 = 0; k0 == 0 || k0 < args.K; k0 += Engine::KC)
            add_k_block<Engine>(args, m0, m_end, n0, n_end, k0, min(args.K - k0, Engine::KC), scratch.part(worker));
        Engine::end();
    });
}
