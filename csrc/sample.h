// How a token is drawn from its logits: gpt.py's sample, whose tokens these are.
//
//   temperature 0    the most likely token, the first of equals
//   else             tokens from the most to the least likely, equals by id; of them the first top_k;
//                    p = softmax(logits / temperature) of those, in double; of them top_p's: a token is dropped where
//                    the sum of those before it is >= top_p; then the first whose running sum is > u times the whole
//                    sum
//
// To sort a whole vocabulary would take longer than the model does for a token. So only as many of the most likely as
// it takes are found, by a histogram of the numbers' leading bits, and sorted; where top_k is large, in growing
// portions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace fastgpt {

class Sampler {
  public:
    // top_k 0 and top_p 2 take all. u: uniform in [0, 1).
    Sampler(double temperature, int64_t top_k, double top_p)
        : temperature_(temperature), top_k_(top_k), top_p_(top_p) {}

    // The token, or -1 if some logit is not finite.
    int64_t draw(const float* logits, int64_t V, double u) {
        const int64_t best = most_likely(logits, V);
        if (best < 0 || temperature_ == 0) return best;
        const double highest = logits[best];
        const auto weight = [&](float x) { return std::exp((double(x) - highest) / temperature_); };
        const int64_t k = top_k_ ? std::min(top_k_, V) : V;
        double total = 0;
        if (k == V)
            for (int64_t i = 0; i < V; i++) total += weight(logits[i]);
        for (int64_t n = k < V ? k : std::min(V, first_portion);; n = std::min(V, 8 * n)) {
            sort_largest(logits, V, n);
            if (k < V)
                for (int64_t i = 0; i < n; i++) total += weight(logits[id(i)]);
            double sum = 0;
            sums_.clear();
            for (int64_t i = 0; i < n && sum < top_p_; i++) sums_.push_back(sum += weight(logits[id(i)]) / total);
            const bool whole = sum >= top_p_ || n == k; // is `sum` that of all that may be drawn?
            if (!whole && (top_p_ <= 1 || u >= sum)) continue;
            const int64_t found = std::upper_bound(sums_.begin(), sums_.end(), whole ? u * sum : u) - sums_.begin();
            return id(std::min(found, int64_t(sums_.size()) - 1));
        }
    }

  private:
    static constexpr int64_t first_portion = 1024;
    static constexpr int bits = 14; // of a bucket's number

    static int64_t most_likely(const float* logits, int64_t V) {
        bool finite = true;
        for (int64_t i = 0; i < V; i++) finite &= std::fabs(logits[i]) <= std::numeric_limits<float>::max();
        if (!finite) return -1;
        return std::max_element(logits, logits + V) - logits;
    }

    static uint32_t key(float x) { // smaller for larger x
        x += 0.0f;                 // -0 equals 0
        uint32_t u;
        memcpy(&u, &x, 4);
        return u >> 31 ? u : ~u & 0x7FFFFFFF;
    }

    int64_t id(int64_t i) const { return int64_t(sorted_[i] & 0xFFFFFFFF); }

    // The n largest come first, in order; a few more may follow.
    void sort_largest(const float* logits, int64_t V, int64_t n) {
        counts_.assign(1 << bits, 0);
        for (int64_t i = 0; i < V; i++) counts_[key(logits[i]) >> (32 - bits)]++;
        uint32_t cut = 0;
        for (int64_t found = 0; (found += counts_[cut]) < n;) cut++;
        sorted_.clear();
        for (int64_t i = 0; i < V; i++)
            if (const uint32_t k = key(logits[i]); k >> (32 - bits) <= cut) sorted_.push_back(uint64_t(k) << 32 | i);
        std::sort(sorted_.begin(), sorted_.end());
    }

    double temperature_;
    int64_t top_k_;
    double top_p_;
    std::vector<uint32_t> counts_;
    std::vector<uint64_t> sorted_;
    std::vector<double> sums_;
};

} // namespace fastgpt
