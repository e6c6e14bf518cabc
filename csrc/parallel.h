// Parallel loops on torch's own thread pool: it obeys torch.set_num_threads, and there is no second OpenMP runtime.
//
// libtorch_cpu exports a plain C function, torch_parallel_for (torch >= 2.10, torch/csrc/stable/c/shim.h). Python hands
// its address over at import, so nothing is linked and one build serves every torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastgpt {

struct ThreadPool {
    // (begin, end, grain, body, context) -> 0 on success; body(begin, end, context) gets parts of [begin, end)
    int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) = nullptr;
    int32_t (*num_threads)(uint32_t*) = nullptr;
};
extern ThreadPool pool; // bindings.cpp

inline int num_threads() {
    uint32_t n = 1;
    if (pool.num_threads) pool.num_threads(&n);
    return n < 1 ? 1 : int(n);
}

// body(task, worker) for each task in [0, tasks), by at most `workers` threads at once; worker < workers tells which,
// for scratch memory. Each thread begins with a part of its own, the same in every call of this size, so that it finds
// in its cache what it wrote there; done with that, it takes over tasks of the others, so unequal tasks even out. Which
// thread runs a task must not matter for its result: then the bits are the same for any number of threads. `body` must
// not throw.
template <class Body> void parallel_tasks(int64_t tasks, int workers, const Body& body) {
    constexpr int64_t max_parts = 64;
    struct Part {
        alignas(64) int64_t next;
        int64_t end;
    };
    struct Context {
        const Body& body;
        int parts;
        Part part[max_parts];
        void run(int worker) {
            for (int i = 0; i < parts; i++) {
                Part& p = part[(worker + i) % parts];
                for (;;) {
                    const int64_t task = __atomic_fetch_add(&p.next, 1, __ATOMIC_RELAXED);
                    if (task >= p.end) break;
                    body(task, worker);
                }
            }
        }
    } context{body, int(std::min({int64_t(workers), tasks, max_parts})), {}};
    for (int64_t i = 0; i < context.parts; i++)
        context.part[i] = {tasks * i / context.parts, tasks * (i + 1) / context.parts};
    if (context.parts > 1 && pool.parallel_for)
        pool.parallel_for(
            0, context.parts, 1, [](int64_t begin, int64_t, void* c) { static_cast<Context*>(c)->run(int(begin)); },
            &context);
    context.run(0); // without a pool, all of it; with one, nothing is left
}

template <class Body> void parallel_tasks(int64_t tasks, const Body& body) {
    parallel_tasks(tasks, num_threads(), [&](int64_t task, int) { body(task); });
}

// For large memory that nobody has touched yet: where the system gives huge pages to those who ask (Linux's usual
// setting), the first touch takes half the time, and rows far apart need fewer addresses of pages.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr int64_t huge_page = 2 << 20, page = 4096; // the system may refuse where pages are larger: nothing is lost
    if (bytes < 2 * huge_page) return;
    const int64_t skip = -reinterpret_cast<intptr_t>(memory) & (page - 1);
    madvise(static_cast<char*>(memory) + skip, size_t((bytes - skip) / page * page), MADV_HUGEPAGE);
#endif
}

// Memory for a kernel's intermediate values, aligned to a cache line, one part per worker.
template <class T> class Scratch {
  public:
    Scratch(int64_t parts, int64_t values)
        : values_((values * int64_t(sizeof(T)) + 63) / 64 * 64 / int64_t(sizeof(T))) {
        const int64_t bytes = parts * values_ * int64_t(sizeof(T)) + 64;
        if (posix_memalign(reinterpret_cast<void**>(&memory_), 64, size_t(bytes))) throw std::bad_alloc();
        ask_for_huge_pages(memory_, bytes);
#ifdef FASTGPT_POISON // for tests: NaN in all of it, so that a value that nobody wrote shows
        memset(static_cast<void*>(memory_), 0xFF, size_t(bytes));
#endif
    }
    ~Scratch() { free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T& operator[](int64_t i) const { return memory_[i]; } // of the first part
    T* part(int64_t i) const { return memory_ + i * values_; }

  private:
    T* memory_;
    int64_t values_;
};

} // namespace fastgpt
